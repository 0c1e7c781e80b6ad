// Calls one function of the CPU library with arguments from a file, and writes back the memory that
// they point into: what a test runs in an emulator of another processor.
//
// The file is 64-bit words: the number of blocks of memory, and each one's bytes and contents; then
// the number of arguments, and each one's kind (0: a number; 1: null; 2 + i: an address in block i)
// and value (the number, or the offset in bytes); last the double, which no integer comes after in
// its registers. All that the library takes is 64 bits wide, so one type of function serves.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

std::FILE* file;

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, file) != bytes) std::exit(3);
}

int64_t word() {
  int64_t value;
  read(&value, sizeof(value));
  return value;
}

}  // namespace

// Arguments: the library, the function's name, the file to read, the file to write.
int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  void* symbol = library == nullptr ? nullptr : dlsym(library, argv[2]);
  file = std::fopen(argv[3], "rb");
  if (symbol == nullptr || file == nullptr) return 2;
  std::vector<std::vector<char>> blocks(static_cast<size_t>(word()));
  for (auto& block : blocks) {
    block.resize(static_cast<size_t>(word()));
    read(block.data(), block.size());
  }
  int64_t a[24] = {};
  const int64_t count = word();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kind = word(), value = word();
    a[i] = kind == 0 ? value : 0;
    if (kind >= 2) {
      a[i] = reinterpret_cast<int64_t>(blocks[static_cast<size_t>(kind - 2)].data() + value);
    }
  }
  double number;
  read(&number, sizeof(number));
  using Function =
      int64_t (*)(double, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  Function function;
  std::memcpy(&function, &symbol, sizeof(symbol));
  const int64_t result =
      function(number, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
               a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23]);
  std::FILE* out = std::fopen(argv[4], "wb");
  if (out == nullptr) return 4;
  std::fwrite(&result, sizeof(result), 1, out);
  for (auto& block : blocks) std::fwrite(block.data(), 1, block.size(), out);
  return std::fclose(out) == 0 ? 0 : 5;
}
