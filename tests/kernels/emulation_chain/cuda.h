// Tensors as the copy engine knows them: [batch, groups, tokens, columns of a group], moved in boxes of so many groups and tokens.
// Where a box has one group, its first column says which.
#pragma once

#include <cstdint>

struct CUtensorMap {
  char* at;
  int64_t token_bytes, batch_bytes;
  int tokens, groups, box_tokens, box_groups, columns, element;
};
