// Tensors as the copy engine knows them: [batch, tokens, columns], moved in boxes of so many tokens and columns.
#pragma once

#include <cstdint>

struct CUtensorMap {
  char* at;
  int64_t token_bytes, batch_bytes;
  int tokens, columns, box_tokens, box_columns, element;
};
