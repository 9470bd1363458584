// A hash of memory, by which a kept copy of weights is known to be of the weights as they are now.
#pragma once
#include <cstdint>

namespace zf {

// Every byte counts: two contents that differ in one aligned word never have the same hash, others once in 2^64.
uint64_t hash_bytes(const void* data, int64_t bytes, int threads);

}  // namespace zf
