// The hash, in levels: each takes blocks of 4 KiB to 16 bytes, so that the next has 256 times less to do.
//
// A block's hash is NH of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway, CRYPTO 1999), on words of 64 bits: the sum of
// (a + k)(b + k') over its pairs of words (a, b), mod 2^128, with a key word k for each. For keys that nobody knows, two
// different blocks have the same hash with probability 2^-64 at most, whatever they hold: no change cancels another. A
// key word is drawn when it is first used, from the system, and lives as long as the process.
//
// Work: a multiplication of 64 bits and four additions for 16 bytes, under the time that memory takes to bring them.
#include "hash.h"

#include <cstring>
#include <random>

#include "parallel.h"

namespace zf {

namespace {

constexpr int64_t block_words = 512;                // of 8 bytes: a block is as long as its key
constexpr int64_t block_bytes = block_words * 8;
constexpr int64_t block_hash = 16;                  // bytes
constexpr int levels = 8;                           // enough for 2^63 bytes
constexpr int64_t blocks_of_task = 64;

struct Keys {
  uint64_t word[levels][block_words];
  Keys() {
    std::random_device source;
    for (auto& level : word)
      for (uint64_t& w : level) w = uint64_t(source()) << 32 | source();
  }
};

const Keys& keys() {
  static const Keys keys;
  return keys;
}

inline uint64_t word_at(const unsigned char* p) {
  uint64_t w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

// Of a block, or of the last, which ends where the data does and is taken as if zeros came after it.
unsigned __int128 hash_block(const unsigned char* data, int64_t bytes, const uint64_t* key) {
  unsigned __int128 sum = 0, other = 0;  // two chains of additions
  const auto add = [&](const unsigned char* p, int64_t w) {
    sum += static_cast<unsigned __int128>(word_at(p) + key[w]) * (word_at(p + 8) + key[w + 1]);
  };
  int64_t done = 0;
  for (; done + 32 <= bytes; done += 32) {
    add(data + done, done / 8);
    const unsigned char* p = data + done + 16;
    other += static_cast<unsigned __int128>(word_at(p) + key[done / 8 + 2]) * (word_at(p + 8) + key[done / 8 + 3]);
  }
  for (; done < bytes; done += 16) {
    unsigned char last[16] = {};
    std::memcpy(last, data + done, size_t(bytes - done < 16 ? bytes - done : 16));
    add(last, done / 8);
  }
  return sum + other;
}

}  // namespace

Hash hash_bytes(const void* data, int64_t bytes, int threads) {
  const auto* from = static_cast<const unsigned char*>(data);
  const int64_t all = bytes, first_blocks = (bytes + block_bytes - 1) / block_bytes;
  // The hashes of a level's blocks, and after them those of the next.
  auto* to = static_cast<unsigned char*>(thread_scratch(0, (first_blocks + first_blocks / 128 + levels) * block_hash));
  for (int level = 0; level < levels - 1; ++level) {
    const int64_t blocks = (bytes + block_bytes - 1) / block_bytes;
    parallel_for(blocks, blocks_of_task, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t left = bytes - i * block_bytes;
        const auto hash = hash_block(from + i * block_bytes, left < block_bytes ? left : block_bytes, keys().word[level]);
        std::memcpy(to + i * block_hash, &hash, sizeof hash);
      }
    });
    from = to;
    bytes = blocks * block_hash;
    to += bytes;
    if (blocks <= 1) break;
  }
  // Of the one hash that is left, and of how long the data is.
  unsigned char last[32] = {};
  std::memcpy(last, from, size_t(bytes));
  std::memcpy(last + 16, &all, sizeof all);
  const auto hash = hash_block(last, sizeof last, keys().word[levels - 1]);
  return {uint64_t(hash), uint64_t(hash >> 64)};
}

}  // namespace zf
