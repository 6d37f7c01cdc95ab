// What was called, as one JSON object per call, in order. Python reads it through rec_fetch.

#ifndef JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_LOG_H_
#define JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_LOG_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace recording {

inline std::string Hex(const void* data, size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::string digits;
  digits.reserve(2 * size);
  for (size_t i = 0; i < size; ++i) {
    digits += "0123456789abcdef"[bytes[i] >> 4];
    digits += "0123456789abcdef"[bytes[i] & 15];
  }
  return digits;
}

// A name for the thread that calls.
inline std::string ThreadName() {
  std::ostringstream name;
  name << std::this_thread::get_id();
  return name.str();
}

// Builds one JSON object: Entry("launch").Add("grid", {1, 2, 3}).
class Entry {
 public:
  explicit Entry(const char* call) : text_("{\"call\":") {
    Quote(call);
    Add("thread", ThreadName());
  }

  Entry& Add(const char* key, const std::string& value) { return Name(key).Quote(value); }
  Entry& Add(const char* key, const char* value) { return Name(key).Quote(value); }

  template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
  Entry& Add(const char* key, T value) {
    Name(key).text_ += std::to_string(value);
    return *this;
  }

  Entry& Add(const char* key, const void* pointer) {
    return Add(key, reinterpret_cast<uintptr_t>(pointer));
  }

  template <typename T>
  Entry& Add(const char* key, const std::vector<T>& values) {
    Name(key).text_ += '[';
    for (size_t i = 0; i < values.size(); ++i) {
      if (i) text_ += ',';
      text_ += std::to_string(values[i]);
    }
    text_ += ']';
    return *this;
  }

  Entry& AddNull(const char* key) {
    Name(key).text_ += "null";
    return *this;
  }

  std::string Str() const { return text_ + "}"; }

 private:
  Entry& Name(const char* key) {
    text_ += ',';
    Quote(key).text_ += ':';
    return *this;
  }

  Entry& Quote(const std::string& value) {
    text_ += '"';
    for (char c : value) {
      if (c == '"' || c == '\\') text_ += '\\';
      // No name or path here has control characters; JSON forbids them bare.
      text_ += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
    }
    text_ += '"';
    return *this;
  }

  std::string text_;
};

class Log {
 public:
  static Log& Get() {
    static auto* log = new Log;  // Outlives every static destructor that may still call CUDA.
    return *log;
  }

  void Write(const Entry& entry) { Write(entry.Str()); }

  void Write(std::string line) {
    std::lock_guard<std::mutex> lock(mutex_);
    lines_.push_back(std::move(line));
  }

  size_t Size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return lines_.size();
  }

  // Copies at most `capacity` bytes of a line; returns its length, or -1 if there is no such line.
  int64_t Copy(size_t index, char* out, size_t capacity) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (index >= lines_.size()) return -1;
    lines_[index].copy(out, capacity);
    return static_cast<int64_t>(lines_[index].size());
  }

  void Clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    lines_.clear();
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> lines_;
};

}  // namespace recording

#endif  // JAX_NVFP4_MOE_TESTS_RECORDING_CUDA_LOG_H_
