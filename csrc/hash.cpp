#include "hash.h"

#include <cstring>

#include "parallel.h"

namespace zf {

namespace {

constexpr int lanes = 32;                // independent chains, which the compiler lays into vectors
constexpr int64_t piece = int64_t(1) << 18;  // bytes hashed by one task, whatever the threads

// Each step is a bijection of the state and of the word, so a change of one word cannot vanish.
inline uint32_t mix(uint32_t state, uint32_t word) {
  const uint32_t h = (state ^ word) * 0x9E3779B1u;
  return h ^ (h >> 15);
}

uint64_t finish(uint64_t h) {
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdull;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return h ^ (h >> 33);
}

uint64_t hash_piece(const unsigned char* data, int64_t bytes) {
  uint32_t state[lanes], words[lanes];
  for (int i = 0; i < lanes; ++i) state[i] = 0x85ebca6bu * uint32_t(i + 1);
  for (; bytes > 0; data += sizeof words, bytes -= sizeof words) {
    if (bytes < int64_t(sizeof words)) std::memset(words, 0, sizeof words);
    std::memcpy(words, data, bytes < int64_t(sizeof words) ? size_t(bytes) : sizeof words);
    for (int i = 0; i < lanes; ++i) state[i] = mix(state[i], words[i]);
  }
  uint64_t hash = 0;
  for (int i = 0; i < lanes; ++i) hash = finish(hash ^ state[i]);
  return hash;
}

}  // namespace

uint64_t hash_bytes(const void* data, int64_t bytes, int threads) {
  const auto* first = static_cast<const unsigned char*>(data);
  const int64_t pieces = (bytes + piece - 1) / piece;
  auto* hashes = static_cast<uint64_t*>(thread_scratch(0, pieces * int64_t(sizeof(uint64_t)) + 8));
  parallel_for(pieces, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      hashes[i] = hash_piece(first + i * piece, bytes - i * piece < piece ? bytes - i * piece : piece);
  });
  uint64_t hash = finish(uint64_t(bytes));
  for (int64_t i = 0; i < pieces; ++i) hash = finish(hash ^ hashes[i]);
  return hash;
}

}  // namespace zf
