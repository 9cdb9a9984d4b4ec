// The scale of a row that becomes e4m3: its largest relu(h)^2 over 448, and at least FLOOR over 448: all else would be zeros over
// zero.
#pragma once

#include "ptx.cuh"

constexpr float FLOOR = 1e-12f, LARGEST = 448;

// Of a row whose largest relu(h) has these 16 bits. A NaN stays one.
__device__ __forceinline__ float scale_of(u32 largest) {
  const float root = low_float(largest), most = root * root;
  return (most < FLOOR ? FLOOR : most) / LARGEST;
}

// The squares of two relu(h), `inverse` being of the scale.
__device__ __forceinline__ u32 scaled_squares(float low, float high, float inverse) {
  return pack_e4m3(low * low * inverse, high * high * inverse);
}
