// The original defines mathematical functions of bfloat16 by the Metal compiler's built-in ones;
// metal_math.h has them.
