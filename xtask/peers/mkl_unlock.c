/* MKL picks its AVX2 kernels on AMD even when AVX-512 is there. PyTorch exports these two symbols,
   so a preloaded library can say yes: cc -shared -fPIC -O2 mkl_unlock.c -o mkl_unlock.so */
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
