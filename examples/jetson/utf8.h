// UTF-8 to code points and back.
#pragma once

#include <string>
#include <vector>

inline void appendUtf8(std::string& out, char32_t point) {
  auto add = [&out](char32_t byte) { out += static_cast<char>(byte); };
  if (point < 0x80) {
    add(point);
  } else if (point < 0x800) {
    add(0xC0 | point >> 6);
    add(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    add(0xE0 | point >> 12);
    add(0x80 | (point >> 6 & 0x3F));
    add(0x80 | (point & 0x3F));
  } else {
    add(0xF0 | point >> 18);
    add(0x80 | (point >> 12 & 0x3F));
    add(0x80 | (point >> 6 & 0x3F));
    add(0x80 | (point & 0x3F));
  }
}

// The code point that begins at `at`, which moves behind it. A byte that begins none counts as U+FFFD by itself.
inline char32_t nextPoint(std::string const& text, size_t& at) {
  auto byte = [&text](size_t i) { return static_cast<unsigned char>(text[i]); };
  unsigned char const first = byte(at);
  size_t const more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2 : first >> 3 == 30 ? 3 : 9;
  bool whole = more != 9 && at + more < text.size();
  for (size_t i = 1; whole && i <= more; ++i) whole = byte(at + i) >> 6 == 2;
  if (!whole) {
    ++at;
    return 0xFFFD;
  }
  char32_t point = more == 0 ? first : first & (0x3F >> more);
  for (size_t i = 1; i <= more; ++i) point = point << 6 | (byte(at + i) & 0x3F);
  at += more + 1;
  return point;
}
