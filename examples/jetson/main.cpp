// Writes text with a bundle's TensorRT engines. See README.md.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "sampler.h"
#include "tokenizer.h"

namespace {

char const kUsage[] =
    "usage: mamba_generate --engines DIR [options]\n"
    "  --engines DIR      folder with model.engine, or prefill.engine and step.engine\n"
    "  --plugin FILE      libmamba_plugins.so, where the engines need it\n"
    "  --tokenizer FILE   tokenizer.json\n"
    "  --prompt TEXT      text to continue; - reads it from standard input\n"
    "  --tokens 1,2,3     a prompt as token ids; prints token ids where there is no tokenizer\n"
    "  -n N               new tokens (128)\n"
    "  --temperature T    0 is greedy (0)\n"
    "  --top-k K          of the K likeliest tokens; 0 is of all (0)\n"
    "  --seed N           of the draws (0)\n"
    "  --eos ID           token that ends the text; -1 is none (the tokenizer's <|endoftext|>)\n"
    "  --no-graphs        steps without CUDA graphs\n";

struct Options {
  std::string engines, plugin, tokenizer, prompt, tokens;
  bool hasPrompt = false, graphs = true;
  long count = 128;
  double temperature = 0;
  long topK = 0, seed = 0, eos = -2;
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

long wholeNumber(std::string const& text) {
  char* end = nullptr;
  long const value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0') throw UsageError("'" + text + "' is not a whole number");
  return value;
}

double number(std::string const& text) {
  char* end = nullptr;
  double const value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw UsageError("'" + text + "' is not a number");
  return value;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string const name = arguments[i];
    if (name == "--help" || name == "-h") {
      std::printf("%s", kUsage);
      std::exit(0);
    }
    if (name == "--no-graphs") {
      options.graphs = false;
      continue;
    }
    if (i + 1 >= count) throw UsageError(name + " is unknown or lacks its value");
    std::string const value = arguments[++i];
    if (name == "--engines") options.engines = value;
    else if (name == "--plugin") options.plugin = value;
    else if (name == "--tokenizer") options.tokenizer = value;
    else if (name == "--prompt") options.prompt = value, options.hasPrompt = true;
    else if (name == "--tokens") options.tokens = value;
    else if (name == "-n") options.count = wholeNumber(value);
    else if (name == "--temperature") options.temperature = number(value);
    else if (name == "--top-k") options.topK = wholeNumber(value);
    else if (name == "--seed") options.seed = wholeNumber(value);
    else if (name == "--eos") options.eos = wholeNumber(value);
    else throw UsageError(name + " is not an option");
  }
  if (options.engines.empty()) throw UsageError("--engines is missing");
  if (options.hasPrompt == !options.tokens.empty()) throw UsageError("give one of --prompt and --tokens");
  if (options.hasPrompt && options.tokenizer.empty()) throw UsageError("--prompt needs --tokenizer");
  if (options.count < 0 || options.topK < 0) throw UsageError("-n and --top-k are 0 or more");
  return options;
}

std::vector<int64_t> parseTokens(std::string const& text) {
  std::vector<int64_t> ids;
  for (size_t from = 0; from <= text.size();) {
    size_t const to = std::min(text.find(',', from), text.size());
    ids.push_back(wholeNumber(text.substr(from, to - from)));
    from = to + 1;
  }
  return ids;
}

double secondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void run(Options const& options) {
  std::unique_ptr<Tokenizer> const tokenizer =
      options.tokenizer.empty() ? nullptr : std::make_unique<Tokenizer>(options.tokenizer);
  std::string prompt = options.prompt;
  if (prompt == "-") prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  std::vector<int64_t> const ids = options.hasPrompt ? tokenizer->encode(prompt) : parseTokens(options.tokens);
  int64_t const eos = options.eos != -2 ? options.eos : tokenizer != nullptr ? tokenizer->endOfText() : -1;

  Model model(options.engines, options.plugin, options.graphs);
  for (int64_t id : ids) {
    if (id < 0 || static_cast<size_t>(id) >= model.vocabulary()) {
      throw UsageError("token id " + std::to_string(id) + " is not in 0.." + std::to_string(model.vocabulary() - 1));
    }
  }
  Sampler sampler(options.temperature, static_cast<size_t>(options.topK), static_cast<uint64_t>(options.seed));

  auto const started = std::chrono::steady_clock::now();
  float const* logits = model.prefill(ids);
  double const promptSeconds = secondsSince(started);
  auto const decoding = std::chrono::steady_clock::now();
  long made = 0;
  while (made < options.count) {
    int64_t const id = sampler.choose(logits, model.vocabulary());
    if (id == eos) break;
    std::string const piece = tokenizer != nullptr ? tokenizer->decode(id) : std::to_string(id) + " ";
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    if (++made < options.count) logits = model.step(id);
  }
  double const seconds = secondsSince(decoding);
  std::printf("\n");
  std::fprintf(stderr, "%zu prompt tokens in %.3f s, %ld tokens, %.1f tokens/s%s\n", ids.size(), promptSeconds, made,
               made > 1 && seconds > 0 ? static_cast<double>(made - 1) / seconds : 0.0,
               model.graphed() ? ", CUDA graphs" : "");
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(parse(count, arguments));
    return 0;
  } catch (UsageError const& error) {
    std::fprintf(stderr, "error: %s\n\n%s", error.what(), kUsage);
    return 2;
  } catch (std::exception const& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 5;
  }
}
