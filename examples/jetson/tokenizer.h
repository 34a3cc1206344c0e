// Byte-level BPE as tokenizer.json describes it: the tokenizers of GPT-2 and GPT-NeoX, which Mamba models use.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

class Tokenizer {
 public:
  // Reads tokenizer.json. Throws std::runtime_error where it is of another kind: give token ids then.
  explicit Tokenizer(std::string const& path);

  std::vector<int64_t> encode(std::string const& text) const;

  // The bytes of one token: a character may be spread over several. Empty for special tokens.
  std::string decode(int64_t id) const;

  // The end-of-text token, or -1.
  int64_t endOfText() const { return endOfText_; }

 private:
  struct Added {
    std::string content;
    int64_t id;
  };

  void encodePlain(std::string const& text, std::vector<int64_t>& ids) const;
  void encodeWord(std::string const& word, std::vector<int64_t>& ids) const;

  std::unordered_map<std::string, int64_t> vocabulary_;
  std::unordered_map<std::string, size_t> ranks_;  // "left right" -> order of the merge
  std::unordered_map<int64_t, std::string> bytes_;
  std::vector<Added> added_;
  bool prefixSpace_ = false;
  bool wholeWords_ = false;
  int64_t endOfText_ = -1;
};

// The words that BPE works on, by GPT-2's rule:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::vector<std::string> splitWords(std::string const& text);
