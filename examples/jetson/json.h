// A reader of JSON, for tokenizer.json.
#pragma once

#include <string>
#include <utility>
#include <vector>

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  double number = 0;  // also of a bool: 0 or 1
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  // The member of that name, or null where there is none.
  Json const& operator[](std::string const& name) const;
  bool isNull() const { return kind == Kind::kNull; }
  bool isTrue() const { return kind == Kind::kBool && number != 0; }
};

// Throws std::runtime_error where `text` is no JSON.
Json parseJson(std::string const& text);
