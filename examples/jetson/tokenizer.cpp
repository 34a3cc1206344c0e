#include "tokenizer.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "json.h"
#include "utf8.h"

namespace {

#include "unicode.inl"

template <size_t kSize>
bool contains(char32_t const (&ranges)[kSize], char32_t point) {
  // The first number above `point` ends a range that holds it, or begins one that does not.
  auto const* above = std::upper_bound(std::begin(ranges), std::end(ranges), point);
  size_t const index = static_cast<size_t>(above - std::begin(ranges));
  return index % 2 == 1 || (index > 0 && ranges[index - 1] == point);
}

bool isLetter(char32_t point) { return contains(kLetters, point); }
bool isNumber(char32_t point) { return contains(kNumbers, point); }
bool isSpace(char32_t point) {
  return (point >= 9 && point <= 13) || point == ' ' || point == 0x85 || point == 0xA0 || point == 0x1680 ||
         (point >= 0x2000 && point <= 0x200A) || point == 0x2028 || point == 0x2029 || point == 0x202F ||
         point == 0x205F || point == 0x3000;
}
bool isOther(char32_t point) { return !isLetter(point) && !isNumber(point) && !isSpace(point); }

// Byte-level BPE writes every byte as a printable character: printable bytes as themselves, the others from U+0100 on.
std::vector<char32_t> byteAlphabet() {
  std::vector<char32_t> alphabet(256);
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    bool const printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    alphabet[byte] = printable ? byte : next++;
  }
  return alphabet;
}

std::string bytesOf(std::string const& token) {
  static std::unordered_map<char32_t, char> const kBytes = [] {
    std::unordered_map<char32_t, char> found;
    auto const alphabet = byteAlphabet();
    for (size_t byte = 0; byte < 256; ++byte) found[alphabet[byte]] = static_cast<char>(byte);
    return found;
  }();
  std::string bytes;
  for (size_t at = 0; at < token.size();) {
    auto const found = kBytes.find(nextPoint(token, at));
    if (found != kBytes.end()) bytes += found->second;
  }
  return bytes;
}

[[noreturn]] void refuse(std::string const& what) {
  throw std::runtime_error("tokenizer.json: " + what + " is not known to this program; give token ids with --tokens");
}

// The byte-level step of a pre-tokenizer, alone or last in a sequence of its own.
Json const& byteLevel(Json const& step) {
  if (step["type"].text == "ByteLevel") return step;
  if (step["type"].text == "Sequence" && step["pretokenizers"].items.size() == 1) {
    return byteLevel(step["pretokenizers"].items[0]);
  }
  refuse("the pre-tokenizer '" + step["type"].text + "'");
}

}  // namespace

std::vector<std::string> splitWords(std::string const& text) {
  std::vector<char32_t> points;
  std::vector<size_t> starts;  // of every point, and the end
  for (size_t at = 0; at < text.size();) {
    starts.push_back(at);
    points.push_back(nextPoint(text, at));
  }
  starts.push_back(text.size());
  size_t const count = points.size();

  auto run = [&](size_t from, bool (*kind)(char32_t)) {
    while (from < count && kind(points[from])) ++from;
    return from;
  };
  auto contraction = [&](size_t from) -> size_t {
    if (points[from] != '\'' || from + 1 >= count) return 0;
    for (char const* ending : {"s", "t", "re", "ve", "m", "ll", "d"}) {
      size_t length = 0;
      while (ending[length] != '\0' && from + 1 + length < count &&
             points[from + 1 + length] == static_cast<char32_t>(ending[length])) {
        ++length;
      }
      if (ending[length] == '\0') return from + 1 + length;
    }
    return 0;
  };

  std::vector<std::string> words;
  for (size_t from = 0; from < count;) {
    size_t to = contraction(from);
    if (to == 0) {
      size_t const first = points[from] == ' ' && from + 1 < count ? from + 1 : from;  // an optional space
      for (auto* kind : {isLetter, isNumber, isOther}) {
        if (to == 0 && kind(points[first])) to = run(first, kind);
      }
    }
    if (to == 0) {  // blanks: all but the last, which goes with the word behind them
      to = run(from, isSpace);
      if (to < count && to - from > 1) --to;
    }
    words.push_back(text.substr(starts[from], starts[to] - starts[from]));
    from = to;
  }
  return words;
}

Tokenizer::Tokenizer(std::string const& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::stringstream content;
  content << file.rdbuf();
  std::string const text = content.str();
  Json const root = parseJson(text);
  Json const& model = root["model"];

  if (model["type"].text != "BPE" || model["byte_fallback"].isTrue()) refuse("a model that is not byte-level BPE");
  for (char const* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model[name].text.empty()) refuse(std::string("the option ") + name);
  }
  // NFC changes nothing in text that is typed or read from files of today; other normalizers would.
  if (!root["normalizer"].isNull() && root["normalizer"]["type"].text != "NFC") {
    refuse("the normalizer '" + root["normalizer"]["type"].text + "'");
  }
  Json const& step = byteLevel(root["pre_tokenizer"]);
  if (!step["use_regex"].isNull() && !step["use_regex"].isTrue()) refuse("ByteLevel without its rule for words");
  prefixSpace_ = step["add_prefix_space"].isTrue();
  wholeWords_ = model["ignore_merges"].isTrue();

  for (auto const& [token, id] : model["vocab"].members) {
    vocabulary_[token] = static_cast<int64_t>(id.number);
    bytes_[static_cast<int64_t>(id.number)] = bytesOf(token);
  }
  for (Json const& merge : model["merges"].items) {
    std::string pair = merge.kind == Json::Kind::kArray && merge.items.size() == 2
                           ? merge.items[0].text + " " + merge.items[1].text
                           : merge.text;
    ranks_.emplace(std::move(pair), ranks_.size());
  }
  for (Json const& token : root["added_tokens"].items) {
    int64_t const id = static_cast<int64_t>(token["id"].number);
    added_.push_back({token["content"].text, id});
    bytes_[id] = token["special"].isTrue() ? std::string() : token["content"].text;
    if (token["content"].text == "<|endoftext|>") endOfText_ = id;
  }
}

std::vector<int64_t> Tokenizer::encode(std::string const& text) const {
  std::vector<int64_t> ids;
  size_t from = 0;
  while (from < text.size()) {  // added tokens stand for themselves: the first in the text, of those the longest
    size_t where = std::string::npos;
    Added const* found = nullptr;
    for (Added const& token : added_) {
      size_t const at = token.content.empty() ? std::string::npos : text.find(token.content, from);
      if (at < where || (at == where && found != nullptr && token.content.size() > found->content.size())) {
        where = at;
        found = &token;
      }
    }
    encodePlain(text.substr(from, where == std::string::npos ? where : where - from), ids);
    if (found == nullptr) break;
    ids.push_back(found->id);
    from = where + found->content.size();
  }
  return ids;
}

void Tokenizer::encodePlain(std::string const& text, std::vector<int64_t>& ids) const {
  if (text.empty()) return;
  bool const prefixed = prefixSpace_ && text[0] != ' ';
  for (std::string const& word : splitWords(prefixed ? " " + text : text)) encodeWord(word, ids);
}

void Tokenizer::encodeWord(std::string const& word, std::vector<int64_t>& ids) const {
  static std::vector<char32_t> const kAlphabet = byteAlphabet();
  std::vector<std::string> parts(word.size());
  std::string whole;
  for (size_t i = 0; i < word.size(); ++i) {
    appendUtf8(parts[i], kAlphabet[static_cast<unsigned char>(word[i])]);
    whole += parts[i];
  }
  auto const known = vocabulary_.find(whole);
  if (wholeWords_ && known != vocabulary_.end()) {
    ids.push_back(known->second);
    return;
  }
  while (parts.size() > 1) {  // the earliest merge there is, everywhere it applies
    size_t best = std::numeric_limits<size_t>::max();
    size_t where = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      auto const rank = ranks_.find(parts[i] + " " + parts[i + 1]);
      if (rank != ranks_.end() && rank->second < best) {
        best = rank->second;
        where = i;
      }
    }
    if (best == std::numeric_limits<size_t>::max()) break;
    parts[where] += parts[where + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  for (std::string const& part : parts) {
    auto const id = vocabulary_.find(part);
    if (id == vocabulary_.end()) throw std::runtime_error("tokenizer.json: no token for a piece of '" + word + "'");
    ids.push_back(id->second);
  }
}

std::string Tokenizer::decode(int64_t id) const {
  auto const found = bytes_.find(id);
  return found == bytes_.end() ? std::string() : found->second;
}
