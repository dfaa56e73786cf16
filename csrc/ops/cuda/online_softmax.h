// Softmax of logits that are not kept: one after the other, each read once. Host and device.
#pragma once

#include "pixel_math.h"

namespace co2s::cuda {

// Of the logits so far: their maximum and Σ exp(z - max).
template <class T> struct OnlineSoftmax {
  T max, sum;
};

template <class T> CO2S_HD OnlineSoftmax<T> begin_softmax(T z) { return {z, T(1)}; }

template <class T> CO2S_HD void add_logit(OnlineSoftmax<T>& state, T z) {
  const bool higher = z > state.max;
  const T distance = higher ? state.max - z : z - state.max;
  const T e = z == state.max ? T(1) : exp_nonpositive(distance); // -inf - -inf would be NaN
  state.sum = higher ? state.sum * e + T(1) : state.sum + e;
  state.max = higher ? z : state.max;
}

// An infinite maximum makes the sum NaN, as subtracting it from the logits does.
template <class T> CO2S_HD OnlineSoftmax<T> finished(OnlineSoftmax<T> state) {
  return {state.max, state.sum + (state.max - state.max)};
}

} // namespace co2s::cuda
