// A hash of memory, by which a kept copy of weights is known to be of the weights as they are now.
#pragma once
#include <array>
#include <cstdint>

namespace zf {

typedef std::array<uint64_t, 2> Hash;

// Every byte counts, and so does their number. Two different contents have the same hash with a probability of under
// 2^-60, whoever chose them: the key is drawn anew for each process, and hashes are not to be kept beyond it.
Hash hash_bytes(const void* data, int64_t bytes, int threads);

}  // namespace zf
