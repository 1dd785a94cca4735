#pragma once

#include "kernels.h"

namespace headrace {

// How the word of one row is drawn; compute/draw.py says what it means.
struct Choice {
  const float* logits;
  float factor;  // log2(e) / temperature; 0: the greatest logit's word
  float min_p;
  double top_p, u;
  int top_k;  // 0: all
};

// The word that each choice picks among `words`; where the greatest logit is not finite, that logit's.
void choose(const Kernels& kernels, const Choice* choices, int rows, int words, int32_t* chosen, int threads);

}  // namespace headrace
