// SHA-256 (FIPS 180-4), for images that come from files.

#ifndef JAX_NVFP4_MOE_SHA256_H_
#define JAX_NVFP4_MOE_SHA256_H_

#include <string>
#include <string_view>

namespace jax_nvfp4_moe {

// The digest in lower-case hexadecimal.
std::string Sha256(std::string_view data);

}  // namespace jax_nvfp4_moe

#endif  // JAX_NVFP4_MOE_SHA256_H_
