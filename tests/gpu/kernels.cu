// The tests' kernels. kernels.ptx is what they are compiled to, with an older version and target
// written into it, which have all that it uses: every driver since CUDA 9's takes it.
//
//   nvcc -arch=compute_75 -fmad=false -ptx kernels.cu &&
//     sed -i 's/^.version .*/.version 6.0/; s/^.target .*/.target sm_60/' kernels.ptx
//
// host_cuda.cc compiles them for the host.

// y = a x + b, and c where there is one; rounded after each step, as numpy does.
extern "C" __global__ void axpb(const float* x, const float* c, float a, float b, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + b + (c ? c[i] : 0);
}

extern "C" __global__ void reverse(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[n - 1 - i];
}

// x [rows, 2 columns], y [rows, columns].
extern "C" __global__ void silu_and_mul(const float* x, float* y, int rows, int columns) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int at = i / columns * 2 * columns + i % columns;
  y[i] = x[at] / (1 + expf(-x[at])) * x[at + columns];
}

// Keeps the stream busy, so that what does not wait for it comes too early.
extern "C" __global__ void idle(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}
