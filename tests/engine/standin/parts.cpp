// Drives the parts of examples/jetson that need no GPU, for test_jetson.py.
//   parts encode tokenizer.json    lines of text in hexadecimal -> token ids
//   parts decode tokenizer.json    lines of token ids -> text in hexadecimal
//   parts sample T K SEED N        logits as doubles on one line -> N choices
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "sampler.h"
#include "tokenizer.h"

namespace {

std::string fromHex(std::string const& text) {
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) bytes += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string toHex(std::string const& bytes) {
  std::string text;
  for (char c : bytes) {
    for (int shift : {4, 0}) text += "0123456789abcdef"[static_cast<unsigned char>(c) >> shift & 15];
  }
  return text;
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> const args(arguments + 1, arguments + count);
  std::string line;
  if (args[0] == "sample") {
    std::getline(std::cin, line);
    std::istringstream numbers(line);
    std::vector<float> logits;
    for (double value; numbers >> value;) logits.push_back(static_cast<float>(value));
    Sampler sampler(std::stod(args[1]), std::stoul(args[2]), std::stoul(args[3]));
    for (long i = 0; i < std::stol(args[4]); ++i) std::cout << sampler.choose(logits.data(), logits.size()) << "\n";
    return 0;
  }
  try {
    Tokenizer const tokenizer(args[1]);
    while (std::getline(std::cin, line)) {
      if (args[0] == "encode") {
        for (int64_t id : tokenizer.encode(fromHex(line))) std::cout << id << " ";
      } else {
        std::istringstream ids(line);
        std::string text;
        for (int64_t id; ids >> id;) text += tokenizer.decode(id);
        std::cout << toHex(text);
      }
      std::cout << "\n";
    }
  } catch (std::exception const& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
