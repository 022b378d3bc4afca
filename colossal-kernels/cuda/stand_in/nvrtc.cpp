// A libnvrtc whose machine code runs on the CPU: the source that NVRTC would get goes to g++ behind
// cuemu.h, and the image is the shared object.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include <dlfcn.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum { SUCCESS = 0, OUT_OF_MEMORY = 1, INVALID_INPUT = 3, COMPILATION = 6, INTERNAL = 11 };

struct Program { std::string name, source, log, image; };

/// The folder of this library, where cuemu.h lies beside it.
std::string folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&folder), &info)) return ".";
  std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

bool write(const std::string& path, const std::string& text) {
  FILE* f = fopen(path.c_str(), "wb");
  if (!f) return false;
  const bool ok = fwrite(text.data(), 1, text.size(), f) == text.size();
  return fclose(f) == 0 && ok;
}

std::string read(const std::string& path) {
  std::string text;
  if (FILE* f = fopen(path.c_str(), "rb")) {
    char part[65536];
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) text.append(part, n);
    fclose(f);
  }
  return text;
}

}  // namespace

API nvrtcVersion(int* major, int* minor) { *major = *minor = 0; return SUCCESS; }

API nvrtcCreateProgram(Program** out, const char* source, const char* name, int headers, const char* const*, const char* const*) {
  if (headers) return INVALID_INPUT;
  *out = new Program{name ? name : "kernels.cu", source, "", ""};
  return SUCCESS;
}

API nvrtcDestroyProgram(Program** program) { delete *program; *program = nullptr; return SUCCESS; }

API nvrtcCompileProgram(Program* p, int count, const char* const* options) {
  const char* temporary = getenv("TMPDIR");
  std::string path = std::string(temporary ? temporary : "/tmp") + "/stand-in-XXXXXX";
  if (!mkdtemp(path.data())) { p->log = "no temporary folder at " + path; return INTERNAL; }
  std::string source = "#include \"cuemu.h\"\n#define CUEMU 1\n";
  for (int i = 0; i < count; ++i) {
    const std::string option = options[i];
    if (option.rfind("-D", 0) == 0) {
      std::string define = option.substr(2);
      const size_t equals = define.find('=');
      if (equals != std::string::npos) define[equals] = ' ';
      source += "#define " + define + "\n";
    } else if (option.rfind("--", 0) != 0) {
      p->log = "unknown option " + option;
      return INVALID_INPUT;
    }
  }
  source += "#line 1 \"" + p->name + "\"\n" + p->source;
  const std::string in = path + "/kernels.cpp", out = path + "/kernels.so", log = path + "/log";
  int status = -1;
  if (write(in, source)) {
    // Contraction is off: a result depends on the order of sums alone.
    const std::string command =
        "g++ -std=c++17 -O2 -march=x86-64-v3 -ffp-contract=off -fno-strict-aliasing -fPIC -shared "
        "-fvisibility=hidden -w -Wl,-z,noexecstack -I'" + folder() + "' -o '" + out + "' '" + in + "' >'" + log + "' 2>&1";
    status = system(command.c_str());
  }
  p->log = read(log);
  p->image = status == 0 ? read(out) : "";
  for (const std::string& file : {in, out, log}) unlink(file.c_str());
  rmdir(path.c_str());
  if (!p->image.empty()) return SUCCESS;
  if (p->log.empty()) p->log = "g++ could not be run";
  return COMPILATION;
}

API nvrtcGetProgramLogSize(Program* p, size_t* size) { *size = p->log.size() + 1; return SUCCESS; }
API nvrtcGetProgramLog(Program* p, char* log) { memcpy(log, p->log.c_str(), p->log.size() + 1); return SUCCESS; }
API nvrtcGetCUBINSize(Program* p, size_t* size) { *size = p->image.size(); return SUCCESS; }
API nvrtcGetCUBIN(Program* p, char* image) { memcpy(image, p->image.data(), p->image.size()); return SUCCESS; }
extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(int code) {
  return code == SUCCESS ? "success" : code == COMPILATION ? "compilation" : "error";
}
