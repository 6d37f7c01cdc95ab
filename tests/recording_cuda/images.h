// How large the parameters of a kernel are. A launch passes only addresses of them, so their sizes
// come from the kernel's image: PTX for what nvcc compiled, ELF ("cubin") for prebuilt kernels.

#ifndef JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_IMAGES_H_
#define JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_IMAGES_H_

#include <elf.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace recording {

struct Parameter {
  uint64_t offset;
  uint64_t size;
};

using Parameters = std::vector<Parameter>;
using Kernels = std::map<std::string, Parameters>;

// The number that follows `word` in `text`, or `otherwise`.
inline uint64_t NumberAfter(std::string_view text, std::string_view word, uint64_t otherwise) {
  size_t at = text.find(word);
  if (at == text.npos) return otherwise;
  at = text.find_first_not_of(' ', at + word.size());
  uint64_t value = 0;
  bool any = false;
  for (; at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])); ++at) {
    value = value * 10 + (text[at] - '0');
    any = true;
  }
  return any ? value : otherwise;
}

// One declaration of a parameter, PTX ISA section "Kernel function parameters", for example
//   .param .align 8 .b8 name[152]     .param .u64 .ptr .global .align 16 name     .param .f32 name
// Appends it, at the offset that its alignment gives, to `parameters`.
inline void AppendDeclaration(std::string_view text, Parameters& parameters) {
  uint64_t width = 0;
  for (const char* type : {".b8", ".u8", ".s8", ".b16", ".u16", ".s16", ".f16", ".b32", ".u32",
                           ".s32", ".f32", ".b64", ".u64", ".s64", ".f64"}) {
    const std::string word = std::string(type) + " ";
    if (text.find(word) != text.npos) width = std::stoul(word.substr(2)) / 8;
  }
  const bool pointer = text.find(".ptr") != text.npos;  // Its .align is that of what it points to.
  const uint64_t alignment = pointer ? width : NumberAfter(text, ".align", width);
  const uint64_t size = width * NumberAfter(text, "[", 1);
  uint64_t offset = parameters.empty() ? 0 : parameters.back().offset + parameters.back().size;
  if (alignment) offset = (offset + alignment - 1) / alignment * alignment;
  parameters.push_back({offset, size});
}

// The kernels of the PTX that a fat binary holds uncompressed (nvcc --compress-mode=none).
inline Kernels KernelsOfPtx(std::string_view fatbin) {
  constexpr std::string_view kEntry = ".entry ";
  Kernels kernels;
  for (size_t at = fatbin.find(kEntry); at != fatbin.npos; at = fatbin.find(kEntry, at)) {
    at += kEntry.size();
    const size_t open = fatbin.find('(', at), close = fatbin.find(')', at);
    if (open == fatbin.npos || close == fatbin.npos || close < open) break;
    std::string name(fatbin.substr(at, open - at));
    name.erase(name.find_last_not_of(" \n\t") + 1);
    Parameters parameters;
    std::string_view list = fatbin.substr(open + 1, close - open - 1);
    for (size_t begin = list.find(".param"); begin != list.npos;) {
      const size_t end = list.find(',', begin);
      AppendDeclaration(list.substr(begin, end - begin), parameters);
      begin = end == list.npos ? end : list.find(".param", end);
    }
    kernels[name] = parameters;
    at = close;
  }
  return kernels;
}

// The fat binary behind what __cudaRegisterFatBinary gets (CUDA's fatbinary_section.h). Its header
// is magic u32, version u16, header size u16, payload size u64.
inline std::string_view FatbinOf(const void* wrapper) {
  struct Wrapper {
    int32_t magic, version;
    const char* data;
    const void* filename_or_fatbins;
  };
  const char* data = static_cast<const Wrapper*>(wrapper)->data;
  uint16_t header;
  uint64_t payload;
  std::memcpy(&header, data + 6, sizeof header);
  std::memcpy(&payload, data + 8, sizeof payload);
  return {data, header + payload};
}

inline bool IsCubin(const void* image) { return std::memcmp(image, ELFMAG, SELFMAG) == 0; }

// The cubin that an image is, or that is first in a fat binary (its header as FatbinOf has it, then
// kind u16, version u16, header size u32); null if there is none, or a compressed one.
inline const void* CubinOf(const void* image) {
  constexpr uint32_t kFatbin = 0xba55ed50;
  uint32_t magic, entry_header;
  uint16_t header;
  const auto* bytes = static_cast<const char*>(image);
  std::memcpy(&magic, bytes, sizeof magic);
  if (magic == kFatbin) {
    std::memcpy(&header, bytes + 6, sizeof header);
    bytes += header;
    std::memcpy(&entry_header, bytes + 4, sizeof entry_header);
    bytes += entry_header;
  }
  return IsCubin(bytes) ? bytes : nullptr;
}

// The length of a cubin, which cuModuleLoadData is not told: where the last of its parts ends.
inline uint64_t CubinSize(const void* image) {
  const auto* elf = static_cast<const Elf64_Ehdr*>(image);
  const auto* sections =
      reinterpret_cast<const Elf64_Shdr*>(static_cast<const char*>(image) + elf->e_shoff);
  uint64_t size = std::max(elf->e_shoff + uint64_t{elf->e_shnum} * elf->e_shentsize,
                           elf->e_phoff + uint64_t{elf->e_phnum} * elf->e_phentsize);
  for (int i = 0; i < elf->e_shnum; ++i) {
    if (sections[i].sh_type == SHT_NOBITS) continue;
    size = std::max<uint64_t>(size, sections[i].sh_offset + sections[i].sh_size);
  }
  return size;
}

// The parameters in one .nv.info section: items of format u8, attribute u8 and a u16, which is the
// value, or (format 4) the length of what follows. EIATTR_KPARAM_INFO (0x17) and its successor for
// large parameters (0x45) are index u32, ordinal u16, offset u16 and a u32 that holds the size: in
// bits 18 and up, or, as read from cubins of flashinfer-cubin 0.6.13 (17472 bytes), as it is.
inline Parameters ParametersOfInfo(const char* at, const char* end) {
  std::map<int, Parameter> by_ordinal;
  while (at + 4 <= end) {
    const auto format = static_cast<unsigned char>(at[0]),
               attribute = static_cast<unsigned char>(at[1]);
    uint16_t length;
    std::memcpy(&length, at + 2, sizeof length);
    at += 4;
    if (format != 4) continue;
    if ((attribute == 0x17 || attribute == 0x45) && length == 12) {
      uint16_t ordinal, offset;
      uint32_t size;
      std::memcpy(&ordinal, at + 4, sizeof ordinal);
      std::memcpy(&offset, at + 6, sizeof offset);
      std::memcpy(&size, at + 8, sizeof size);
      by_ordinal[ordinal] = {offset, attribute == 0x17 ? size >> 18 : size};
    }
    at += length;
  }
  Parameters parameters;
  for (const auto& [ordinal, parameter] : by_ordinal) parameters.push_back(parameter);
  return parameters;
}

inline Kernels KernelsOfCubin(const void* image) {
  constexpr std::string_view kInfo = ".nv.info.";
  const auto* bytes = static_cast<const char*>(image);
  const auto* elf = static_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + elf->e_shoff);
  const char* names = bytes + sections[elf->e_shstrndx].sh_offset;
  Kernels kernels;
  for (int i = 0; i < elf->e_shnum; ++i) {
    const std::string_view name = names + sections[i].sh_name;
    if (name.substr(0, kInfo.size()) != kInfo) continue;
    const char* begin = bytes + sections[i].sh_offset;
    kernels[std::string(name.substr(kInfo.size()))] =
        ParametersOfInfo(begin, begin + sections[i].sh_size);
  }
  return kernels;
}

// How much shared memory the kernels of a cubin declare: sections .nv.shared.NAME. Of these the
// first KiB is the system's, which ptxas 13.4 counts there for SM100 and its report does not.
inline std::map<std::string, uint64_t> SharedOfCubin(const void* image) {
  constexpr std::string_view kShared = ".nv.shared.";
  constexpr uint64_t kReserved = 1024;
  const auto* bytes = static_cast<const char*>(image);
  const auto* elf = static_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + elf->e_shoff);
  const char* names = bytes + sections[elf->e_shstrndx].sh_offset;
  std::map<std::string, uint64_t> shared;
  for (int i = 0; i < elf->e_shnum; ++i) {
    const std::string_view name = names + sections[i].sh_name;
    if (name.substr(0, kShared.size()) != kShared) continue;
    shared[std::string(name.substr(kShared.size()))] =
        sections[i].sh_size - std::min<uint64_t>(sections[i].sh_size, kReserved);
  }
  return shared;
}

}  // namespace recording

#endif  // JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_IMAGES_H_
