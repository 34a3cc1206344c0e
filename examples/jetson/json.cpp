#include "json.h"

#include <cstdlib>
#include <stdexcept>

#include "utf8.h"

namespace {

constexpr int kDeepest = 100;

class Parser {
 public:
  explicit Parser(std::string const& text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    skipBlanks();
    if (at_ != text_.size()) fail("something behind the end");
    return value;
  }

 private:
  [[noreturn]] void fail(char const* what) const {
    throw std::runtime_error(std::string("not JSON: ") + what + " at byte " + std::to_string(at_));
  }

  void skipBlanks() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }

  char next() {
    if (at_ >= text_.size()) fail("it ends early");
    return text_[at_++];
  }

  bool take(char wanted) {
    skipBlanks();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char const* word) {
    for (; *word != '\0'; ++word) {
      if (next() != *word) fail("an unknown word");
    }
  }

  Json parse(int depth) {
    if (depth > kDeepest) fail("it is nested too deeply");
    Json value;
    skipBlanks();
    if (take('{')) {
      value.kind = Json::Kind::kObject;
      if (take('}')) return value;
      do {
        skipBlanks();
        if (next() != '"') fail("a name is missing");
        std::string name = string();
        if (!take(':')) fail("a colon is missing");
        value.members.emplace_back(std::move(name), parse(depth + 1));
      } while (take(','));
      if (!take('}')) fail("a brace is missing");
    } else if (take('[')) {
      value.kind = Json::Kind::kArray;
      if (take(']')) return value;
      do value.items.push_back(parse(depth + 1));
      while (take(','));
      if (!take(']')) fail("a bracket is missing");
    } else if (take('"')) {
      value.kind = Json::Kind::kString;
      value.text = string();
    } else if (take('t')) {
      expect("rue");
      value.kind = Json::Kind::kBool;
      value.number = 1;
    } else if (take('f')) {
      expect("alse");
      value.kind = Json::Kind::kBool;
    } else if (take('n')) {
      expect("ull");
    } else {
      char* end = nullptr;
      value.kind = Json::Kind::kNumber;
      value.number = std::strtod(text_.c_str() + at_, &end);
      if (end == text_.c_str() + at_) fail("no value");
      at_ = static_cast<size_t>(end - text_.c_str());
    }
    return value;
  }

  // After the opening quote.
  std::string string() {
    std::string out;
    for (char c = next(); c != '"'; c = next()) {
      if (c != '\\') {
        out += c;
        continue;
      }
      c = next();
      switch (c) {
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'n': out += '\n'; break;
        case 'r': out += '\r'; break;
        case 't': out += '\t'; break;
        case 'u': {
          char32_t point = hexadecimal();
          if (point >= 0xD800 && point < 0xDC00) {  // the first half of a pair
            if (next() != '\\' || next() != 'u') fail("half a surrogate pair");
            point = 0x10000 + ((point - 0xD800) << 10) + (hexadecimal() - 0xDC00);
          }
          appendUtf8(out, point);
          break;
        }
        default: out += c;
      }
    }
    return out;
  }

  char32_t hexadecimal() {
    char32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      char const c = next();
      int const digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("a bad \\u escape");
      value = value * 16 + static_cast<char32_t>(digit);
    }
    return value;
  }

  std::string const& text_;
  size_t at_ = 0;
};

}  // namespace

Json const& Json::operator[](std::string const& name) const {
  static Json const kNothing;
  for (auto const& [key, value] : members) {
    if (key == name) return value;
  }
  return kNothing;
}

Json parseJson(std::string const& text) { return Parser(text).document(); }
