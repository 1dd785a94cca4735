// Drawing a word of each row. Every sum of weights is exact (see `weigh`), so the word is the one that any other order of
// adding them would pick.
//
// Words are ranked by weight, ties by lower id; every filter keeps the first of them. So what is kept is told by the
// lightest weight kept and how many of that weight are: `Cut`. It is looked for among the few words that are as heavy as
// the heaviest words of the heaviest blocks; only where these do not hold the nucleus, by a histogram over all.
#include "choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "parallel.h"

namespace headrace {
namespace {

constexpr int kFew = 4096;    // values that are cheaper to sort than to count
constexpr int kWindow = 256;  // heaviest blocks whose weights a nucleus is first looked for in

struct Cut {
  float lightest;
  int64_t ties;  // words of that weight that are kept, those of lowest id
  double sum;    // of all that is kept
};

class Row {
 public:
  Row(const Kernels& kernels, const Choice& choice, int words)
      : choice_(choice), blocks_((words + kWordBlock - 1) / kWordBlock) {
    greatest_ = kernels.greatest(choice.logits, words);
    const float most = choice.logits[greatest_];
    decided_ = choice.factor == 0.0f || choice.top_k == 1 || !std::isfinite(most);
    if (choice.top_k >= words) choice_.top_k = 0;
    if (decided_) return;
    weights_.resize(static_cast<size_t>(blocks_) * kWordBlock);
    sums_.resize(blocks_);
    most_.resize(blocks_);
    kernels.weigh(choice.logits, words, most, choice.factor, weights_.data(), sums_.data(), most_.data());
  }

  int pick() {
    if (decided_) return greatest_;
    if (!choice_.top_k && choice_.top_p >= 1 && choice_.min_p == 0) return pick_of_all();
    return pick_of(cut());
  }

 private:
  static double target(double u, double sum) { return std::min(u * sum, std::nextafter(sum, 0.0)); }

  int pick_of_all() const {
    double sum = 0;
    for (double s : sums_) sum += s;
    const double wanted = target(choice_.u, sum);
    double before = 0;
    int block = 0;
    while (before + sums_[block] <= wanted) before += sums_[block++];
    int i = block * kWordBlock;
    while (before + weights_[i] <= wanted) before += weights_[i++];
    return i;
  }

  int pick_of(Cut cut) const {
    const double wanted = target(choice_.u, cut.sum);
    double before = 0;
    for (int block = 0; block < blocks_; ++block) {
      if (most_[block] < cut.lightest) continue;
      for (int i = block * kWordBlock; i < (block + 1) * kWordBlock; ++i) {
        float w = weights_[i];
        if (w < cut.lightest || (w == cut.lightest && cut.ties-- <= 0)) continue;
        before += w;
        if (before > wanted) return i;
      }
    }
    return greatest_;  // not reached: `wanted` is less than the sum
  }

  // The weights of at least `least`, if it is 0 all that are not 0.
  std::vector<float> found(float least) const {
    std::vector<float> values;
    for (int block = 0; block < blocks_; ++block) {
      if (most_[block] < least) continue;
      for (int i = block * kWordBlock; i < (block + 1) * kWordBlock; ++i)
        if (weights_[i] >= least && weights_[i] > 0) values.push_back(weights_[i]);
    }
    return values;
  }

  // A weight that at least `count` words have, if there are so many blocks; else 0.
  float reached(int count) const {
    if (count > blocks_) return 0;
    std::vector<float> ranked(most_);
    std::nth_element(ranked.begin(), ranked.begin() + (count - 1), ranked.end(), std::greater<float>());
    return ranked[count - 1];
  }

  static double sum(const std::vector<float>& values) {
    double sum = 0;
    for (float v : values) sum += v;
    return sum;
  }

  Cut cut() const {
    const float least = choice_.min_p;
    float from = std::max(least, reached(choice_.top_k ? choice_.top_k : kWindow));
    if (!choice_.top_k && choice_.top_p >= 1) from = least;
    std::vector<float> values = found(from);
    const bool cut_off = choice_.top_k && values.size() > static_cast<size_t>(choice_.top_k);
    if (cut_off) {
      std::nth_element(values.begin(), values.begin() + (choice_.top_k - 1), values.end(), std::greater<float>());
      values.resize(choice_.top_k);
    }
    const bool complete = choice_.top_k || from <= least;  // what the filters before top-p leave
    double all = sum(values);
    if (choice_.top_p >= 1) {
      float lightest = *std::min_element(values.begin(), values.end());
      return {lightest, std::count(values.begin(), values.end(), lightest), all};
    }
    if (!complete) {
      const double held = all;
      if (least > 0) {
        std::vector<float> more = found(least);
        all = sum(more);
        if (held < choice_.top_p * all) values = std::move(more);
      } else {
        all = 0;
        for (double s : sums_) all += s;
        if (held < choice_.top_p * all) return narrowed(weights_.data(), weights_.size(), choice_.top_p * all);
      }
    }
    if (values.size() > kFew) return narrowed(values.data(), values.size(), choice_.top_p * all);
    return nucleus(std::move(values), 0, choice_.top_p * all);
  }

  // As `nucleus`, of many values: they are counted by their upper bits first, and only those where the target is reached
  // are looked at.
  static Cut narrowed(const float* values, size_t count, double target) {
    // Weights are multiples of 2^-35 up to 1: their upper 16 bits have 36 exponents of 128 values each, and one more; a
    // weight of 0 counts for nothing, wherever it is put.
    constexpr uint32_t kLow = 91u << 7, kBins = (36u << 7) + 1;
    auto bin = [](float v) -> uint32_t {
      uint32_t bits;
      memcpy(&bits, &v, sizeof bits);
      return bits >> 16 > kLow ? (bits >> 16) - kLow : 0;
    };
    double sums[kBins] = {}, mass = 0;
    for (size_t i = 0; i < count; ++i) sums[bin(values[i])] += values[i];
    uint32_t at = kBins - 1;
    while (at > 0 && mass + sums[at] < target) mass += sums[at--];
    std::vector<float> here;
    for (size_t i = 0; i < count; ++i)
      if (bin(values[i]) == at && values[i] > 0) here.push_back(values[i]);
    return nucleus(std::move(here), mass, target);
  }

  // The fewest of the heaviest values whose sum, and that of heavier ones, `mass`, reaches `target`.
  static Cut nucleus(std::vector<float> values, double mass, double target) {
    std::sort(values.begin(), values.end(), std::greater<float>());
    size_t last = 0;
    while ((mass += values[last]) < target && last + 1 < values.size()) ++last;
    int64_t ties = 1;
    for (size_t i = last; i > 0 && values[i - 1] == values[last]; --i) ++ties;
    return {values[last], ties, mass};
  }

  Choice choice_;
  int blocks_;
  int greatest_;
  bool decided_;
  std::vector<float>& weights_ = scratch().weights;
  std::vector<double>& sums_ = scratch().sums;  // of each block
  std::vector<float>& most_ = scratch().most;

  // Of a thread, whose rows come one after the other: fresh memory for each would cost more than the passes over it.
  struct Scratch {
    std::vector<float> weights, most;
    std::vector<double> sums;
  };
  static Scratch& scratch() {
    static thread_local Scratch mine;
    return mine;
  }
};

}  // namespace

void choose(const Kernels& kernels, const Choice* choices, int rows, int words, int32_t* chosen, int threads) {
  parallel_for(threads, rows, [&](int i) { chosen[i] = Row(kernels, choices[i], words).pick(); });
}

}  // namespace headrace
