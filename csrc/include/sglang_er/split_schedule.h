// How the context of a decoded token is cut into chunks, the unit of work of split-KV attention.
//
// Chunks begin at multiples of chunk_tokens(context), which depends on nothing but the context itself: a
// token's sums are grouped in the same way, and its result has the same bits, in any batch. At most
// kMaxChunks of them, so that a token's partial results are few and one lane of a warp can look after each.
//
// An item is one chunk and one KV head. Blocks take items round robin, the KV heads of a chunk next to each
// other because they lie in the same pages. Everything is computed on the device: no context length is known
// on the host.
#pragma once

#include <cstdint>

#include "sglang_er/macros.h"

namespace sglang_er {

inline constexpr int kMinChunkTokens = 512;
inline constexpr int kMaxChunks = 32;
inline constexpr int64_t kMaxScheduledContext = int64_t{1} << 30;
inline constexpr int kMaxScheduledTokens = 1024;  // one block adds up the chunks of all tokens

SGLANG_ER_INLINE int64_t chunk_tokens(int64_t context) {
  int64_t tokens = kMinChunkTokens;
  while (tokens * kMaxChunks < context) tokens *= 2;
  return tokens;
}

SGLANG_ER_INLINE int chunks_of(int64_t context) {
  const int64_t tokens = chunk_tokens(context);
  return context <= 0 ? 0 : static_cast<int>((context + tokens - 1) / tokens);
}

// Of any context up to `longest`: the size of the workspace.
SGLANG_ER_INLINE int most_chunks(int64_t longest) {
  const int64_t chunks = (longest + kMinChunkTokens - 1) / kMinChunkTokens;
  return chunks < kMaxChunks ? static_cast<int>(chunks) : kMaxChunks;
}

// Row r of query_begin[requests + 1] that token t of the batch belongs to. A batch of one token a request is
// seen without a search.
SGLANG_ER_INLINE int request_of_token(const int64_t* query_begin, int requests, int token) {
  if (token < requests && query_begin[token] == token && query_begin[token + 1] == token + 1) return token;
  int low = 0, high = requests - 1;  // the last request that begins at or before the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (query_begin[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Positions that a token sees, itself included.
SGLANG_ER_INLINE int64_t visible_tokens(const int64_t* query_begin, const int64_t* context_lens, int request,
                                        int token) {
  return context_lens[request] - (query_begin[request + 1] - token) + 1;
}

struct ScheduledChunk {
  int token;
  int chunk;  // of that token
};

// first_chunk[tokens + 1] counts the chunks of the tokens before each; tokens without any are passed over.
SGLANG_ER_INLINE ScheduledChunk scheduled_chunk(const int* first_chunk, int tokens, int chunk) {
  int low = 0, high = tokens - 1;  // the last token whose chunks begin at or before this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, chunk - first_chunk[low]};
}

}  // namespace sglang_er
