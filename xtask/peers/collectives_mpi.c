/* Times collectives over MPI as colossal-comm/examples/collectives.rs does: a line
 * `verb bytes microseconds` each. mpicc -O3 -march=native collectives_mpi.c -o collectives_mpi
 * mpirun -n 2 ./collectives_mpi [LARGEST_BYTES] */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static float *full, *other, *part;
static int n, ranks, rank;

static void call(int verb) {
  switch (verb) {
  case 0: MPI_Allreduce(MPI_IN_PLACE, full, n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
  case 1: MPI_Allgather(part, n / ranks, MPI_FLOAT, other, n / ranks, MPI_FLOAT, MPI_COMM_WORLD); break;
  case 2: MPI_Reduce_scatter_block(full, part, n / ranks, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
  case 3: MPI_Alltoall(full, n / ranks, MPI_FLOAT, other, n / ranks, MPI_FLOAT, MPI_COMM_WORLD); break;
  case 4: MPI_Bcast(full, n, MPI_FLOAT, 0, MPI_COMM_WORLD); break;
  case 5: MPI_Reduce(rank ? full : MPI_IN_PLACE, full, n, MPI_FLOAT, MPI_SUM, 0, MPI_COMM_WORLD); break;
  case 6: MPI_Gather(part, n / ranks, MPI_FLOAT, other, n / ranks, MPI_FLOAT, 0, MPI_COMM_WORLD); break;
  case 7: MPI_Scatter(full, n / ranks, MPI_FLOAT, part, n / ranks, MPI_FLOAT, 0, MPI_COMM_WORLD); break;
  case 8: MPI_Sendrecv(full, n, MPI_FLOAT, (rank + 1) % ranks, 0, other, n, MPI_FLOAT, (rank + ranks - 1) % ranks, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE); break;
  case 9: MPI_Barrier(MPI_COMM_WORLD); break;
  }
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int main(int count, char **arguments) {
  const char *verbs[] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter", "shift", "barrier"};
  const size_t sizes[] = {1 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20};
  const int repeats[] = {1000, 300, 60, 6, 2};
  size_t largest = count > 1 ? strtoull(arguments[1], NULL, 10) : 16 << 20;
  MPI_Init(&count, &arguments);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  full = malloc(largest);
  other = malloc(largest);
  part = malloc(largest);
  for (int s = 0; s < 5 && sizes[s] <= largest; s++) {
    n = sizes[s] / sizeof(float);
    for (int i = 0; i < n; i++) full[i] = other[i] = part[i] = 1e-30f;
    for (int verb = 0; verb < (s ? 9 : 10); verb++) {
      double turns[5];
      call(verb);
      call(verb);
      for (int turn = 0; turn < 5; turn++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        for (int i = 0; i < repeats[s]; i++) call(verb);
        double mine = (MPI_Wtime() - start) / repeats[s];
        MPI_Allreduce(&mine, turns + turn, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      }
      qsort(turns, 5, sizeof(double), compare);
      if (!rank) printf("%s %zu %.2f\n", verbs[verb], verb == 9 ? 0 : sizes[s], turns[2] * 1e6);
    }
  }
  MPI_Finalize();
}
