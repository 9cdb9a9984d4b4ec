// Every inline PTX instruction of the kernels, each wrapped once. No torch, no standard headers: NVRTC compiles this.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(64) TensorMap {  // CUtensorMap, opaque: what a bulk tensor copy needs to know of a tensor
  u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Read anew: where a warpgroup starts with fewer registers than it takes later, the compiler must not keep across that in a
// register that is not there yet what it has found out of the thread's index before.
__device__ __forceinline__ u32 thread_index() {
  u32 index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The same value, of which the compiler no longer knows where it comes from.
__device__ __forceinline__ int launder(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A value that all threads of a warp have: the compiler learns that they have the same, and stay together where it decides.
__device__ __forceinline__ int uniform(u32 value) { return (int)__reduce_max_sync(~0u, value); }

// --- mbarrier: a counter of arrivals and of bytes still to come, with a phase bit to wait for

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the other block of the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the same barrier of any block in the cluster, one's own included. What the barriers order here is done by the
// copy engine and the tensor cores; a release or acquire of cluster scope would flush caches at every stage (measured: the
// matmul ran at half speed).
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 block) {
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Far longer than any wait can take, waits give up: an error is better than a GPU that hangs. Under compute-sanitizer all
// takes longer: there it is defined as the largest u32, which means never.
#ifndef WAIT_TRIES
#define WAIT_TRIES (1u << 24)
#endif

// Waits for the phase to end.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  for (u32 tries = 0, done = 0; !done; ++tries) {
    asm volatile(
        "{.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;}"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
    if (tries > WAIT_TRIES) __trap();
  }
}

// Among `threads` threads of the block. Barrier 0 is for all of them.
__device__ __forceinline__ void sync_threads(u32 barrier, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Over the threads of a block of whole warps.
template <int N>
__device__ __forceinline__ void block_sums(int (&values)[N]) {
  __shared__ int sums[N][32];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int sum = __reduce_add_sync(~0u, values[i]);
    if (lane == 0) sums[i][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = __reduce_add_sync(~0u, lane < blockDim.x / 32 ? sums[i][lane] : 0);
  __syncthreads();
}

// The sum over the threads before this one of a block of whole warps. Afterwards `value` is that over all.
__device__ __forceinline__ int block_before(int& value) {
  __shared__ int sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int more = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += more;
  }
  if (lane == 31) sums[warp] = before;
  before -= value;
  __syncthreads();
  const int sum = lane < blockDim.x / 32 ? sums[lane] : 0;
  value = __reduce_add_sync(~0u, sum);
  before += __reduce_add_sync(~0u, lane < warp ? sum : 0);
  __syncthreads();
  return before;
}

// The largest of each half, over the threads of a block of whole warps.
__device__ __forceinline__ u32 block_max2(u32 value) {
  __shared__ u32 values[32];
  const int lane = threadIdx.x % 32;
  for (int step = 16; step > 0; step /= 2) value = __vmaxu2(value, __shfl_xor_sync(~0u, value, step));
  if (lane == 0) values[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? values[lane] : 0;
  for (int step = 16; step > 0; step /= 2) value = __vmaxu2(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// --- clusters

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A float of the shared memory of any block in the cluster.
__device__ __forceinline__ float load_remote(u32 shared, u32 block) {
  float value;
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];}"
      : "=f"(value)
      : "r"(shared), "r"(block)
      : "memory");
  return value;
}

// --- a kernel that starts while the one before it in the stream ends, where its launch allows that

// The next kernel's blocks may come as soon as all of this one's have started.
__device__ __forceinline__ void launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Until the kernel before has ended, and all that it wrote is there.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- asynchronous copies: 16 bytes into shared memory, in groups that end in their order

// Zeros where it is not `there`.
__device__ __forceinline__ void copy_16(u32 shared, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups but the last so many are there.
template <int GROUPS>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// --- shared memory by its address

__device__ __forceinline__ u32 load_shared(u32 shared) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(shared) : "memory");
  return word;
}

__device__ __forceinline__ uint2 load_shared_two(u32 shared) {
  uint2 two;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(two.x), "=r"(two.y) : "r"(shared) : "memory");
  return two;
}

__device__ __forceinline__ uint4 load_shared_four(u32 shared) {
  uint4 four;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "r"(shared)
               : "memory");
  return four;
}

__device__ __forceinline__ void store_shared_four(u32 shared, uint4 four) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(four.x), "r"(four.y), "r"(four.z), "r"(four.w)
               : "memory");
}

// --- bulk copies into shared memory: of bytes, and of a box of a tensor, zeros where it lies outside

__device__ __forceinline__ void copy_box(u32 shared, const TensorMap& map, int i0, int i1, int i2, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          shared),
      "l"(&map), "r"(i0), "r"(i1), "r"(i2), "r"(barrier)
      : "memory");
}

// `bytes` from `from` on, both multiples of 16.
__device__ __forceinline__ void copy_bytes(u32 shared, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

// A box of a tensor of five dimensions, into every block of the cluster that `blocks` has a bit for, at the same shared
// address and barrier.
__device__ __forceinline__ void copy_box_to(u16 blocks, u32 shared, const TensorMap& map, int i0, int i1, int i2, int i3, int i4,
                                            u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared),
      "l"(&map), "r"(i0), "r"(i1), "r"(i2), "r"(i3), "r"(i4), "r"(barrier), "h"(blocks)
      : "memory");
}

// --- registers: what a warpgroup gives up, another may take

template <int COUNT>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- wgmma: matrix multiplication by a warpgroup, asynchronous

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Describes a tile in shared memory that is MN-major: rows of 64 along M or N, swizzled by 128 bytes; `BLOCK` bytes further on
// the next 64.
template <int BLOCK>
__device__ __forceinline__ u64 mn_major_descriptor(u32 shared) {
  const u64 eight_rows = (8 * 128) >> 4;
  return (1ull << 62) | (eight_rows << 32) | ((u64)(BLOCK >> 4) << 16) | ((shared & 0x3FFFF) >> 4);
}

// The same of one that is K-major: rows of `SWIZZLE` bytes along K, swizzled by that much (64 or 128).
template <int SWIZZLE>
__device__ __forceinline__ u64 k_major_descriptor(u32 shared) {
  const u64 eight_rows = (8 * SWIZZLE) >> 4;
  return ((u64)(SWIZZLE == 128 ? 1 : 2) << 62) | (eight_rows << 32) | (1ull << 16) | ((shared & 0x3FFFF) >> 4);
}

#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define EIGHT_FLOATS(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_32(i) EIGHT_FLOATS(i), EIGHT_FLOATS(i + 8), EIGHT_FLOATS(i + 16), EIGHT_FLOATS(i + 24)

// d (64 x 256) += A (64 x 32, two of four stored) * B (256 x 32)^T. SELECTOR: which two threads of four give metadata. A_MAJOR, B_MAJOR:
// 1 where A or B is MN-major.
// d must start from plain zeros: an initial value from elsewhere makes ptxas run all products one by one (C7510).
template <int SELECTOR, int A_MAJOR, int B_MAJOR>
__device__ __forceinline__ void wgmma_sparse(float (&d)[128], u64 a, u64 b, u32 metadata) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sp.sync.aligned.m64n256k32.f32." ELEMENT "." ELEMENT
      " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
      "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, %130, %131, p, 1, 1, %132, %133;}"
      : FLOATS_32(0), FLOATS_32(32), FLOATS_32(64), FLOATS_32(96)
      : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR), "n"(A_MAJOR), "n"(B_MAJOR));
}

// The same of e4m3, with 64 columns of K. All four threads of a quad give metadata.
__device__ __forceinline__ void wgmma_sparse_e4m3(float (&d)[128], u64 a, u64 b, u32 metadata) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sp.sync.aligned.m64n256k64.f32.e4m3.e4m3"
      " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
      "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, %130, 0, p, 1, 1;}"
      : FLOATS_32(0), FLOATS_32(32), FLOATS_32(64), FLOATS_32(96)
      : "l"(a), "l"(b), "r"(metadata));
}

// d (64 x 256) += A (64 x 16) * B (256 x 16)^T.
template <int A_MAJOR, int B_MAJOR>
__device__ __forceinline__ void wgmma_dense(float (&d)[128], u64 a, u64 b) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." ELEMENT "." ELEMENT
      " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
      "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, %130, %131;}"
      : FLOATS_32(0), FLOATS_32(32), FLOATS_32(64), FLOATS_32(96)
      : "l"(a), "l"(b), "n"(A_MAJOR), "n"(B_MAJOR));
}

// The same of e4m3, with 32 columns of K.
__device__ __forceinline__ void wgmma_dense_e4m3(float (&d)[128], u64 a, u64 b) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3"
      " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
      "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1;}"
      : FLOATS_32(0), FLOATS_32(32), FLOATS_32(64), FLOATS_32(96)
      : "l"(a), "l"(b));
}

// --- mma: matrix multiplication by a warp. d (16 x 8) += a (16 x K) * b (K x 8); K is 32 bytes long

#define MMA(NAME, HOW)                                                                                                        \
  __device__ __forceinline__ void NAME(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {                                    \
    asm("mma.sync.aligned." HOW ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                      \
  }

MMA(mma, "m16n8k16.row.col.f32." ELEMENT "." ELEMENT)
MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16")
MMA(mma_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3")

// --- two 16-bit floats in a word

// Above infinity: all NaNs count as this much.
constexpr u32 MOST = sizeof(ELEMENT) == sizeof("bf16") ? 0x7F817F81u : 0x7C017C01u;

__device__ __forceinline__ u32 pack_floats(float low, float high) {
  u32 word;
  asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Of max(x, 0), as `relu` has it.
__device__ __forceinline__ u32 pack_relu(float low, float high) {
  u32 word;
  asm("cvt.rn.relu." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Two e4m3 in the low half; what is too large becomes the largest, 448.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
  u16 two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  return two;
}

// The two e4m3 in the low half of a word, as f16.
__device__ __forceinline__ u32 widen_e4m3(u32 word) {
  u32 two;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)word));
  return two;
}

// Of 8 x 8 values, row g of which threads 4 g to 4 g + 3 have, the same threads get column g.
__device__ __forceinline__ u32 transpose(u32 word) {
  u32 column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(word));
  return column;
}

// Of four 8 x 8 matrices in shared memory, row r of matrix m being where thread 8 m + r points to, thread 4 g + q gets columns 2 q
// and 2 q + 1 of row g.
__device__ __forceinline__ void load_matrices(u32 (&words)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// The same, but rows 2 q and 2 q + 1 of column g.
__device__ __forceinline__ void load_transposed(u32 (&words)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ float to_float(u16 value) {
  float result;
  if (sizeof(ELEMENT) == sizeof("bf16")) {
    result = __uint_as_float((u32)value << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  }
  return result;
}

__device__ __forceinline__ float low_float(u32 word) { return to_float((u16)word); }
__device__ __forceinline__ float high_float(u32 word) { return to_float((u16)(word >> 16)); }

// Good enough to be rounded to 16 bits. bf16's eight bits are never nearer to a middle than 2^-18; of fp16's eleven one root is nearer
// than the approximation is exact, and gets a step of Newton's.
__device__ __forceinline__ float root(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  if (sizeof(ELEMENT) == sizeof("bf16") || !(x > 0 && x < __int_as_float(0x7F800000))) return root;
  return __fmaf_rn(__fmaf_rn(-root, root, x), __fdividef(0.5f, root), root);
}

// max(x, 0), a NaN becoming the positive one: afterwards the halves order as unsigned integers.
__device__ __forceinline__ u32 relu(u32 word) {
  asm("max.NaN." ELEMENT "x2 %0, %0, %1;" : "+r"(word) : "r"(0u));
  return word;
}

// Rounded once from the exact square, which fp32 holds: 8 (bf16) or 11 (f16) significant bits.
__device__ __forceinline__ u32 square(u32 word) {
  asm("mul.rn." ELEMENT "x2 %0, %0, %0;" : "+r"(word));
  return word;
}

// --- global memory

// A line of 128 bytes into L2, where it is read later.
__device__ __forceinline__ void prefetch(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

// Read and written once: keep it out of the caches' way.
__device__ __forceinline__ uint4 load_streaming(const void* pointer) {
  uint4 value;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer));
  return value;
}

// Always one instruction: the compiler splits a conditional one of four words.
__device__ __forceinline__ void store_four(void* pointer, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_two(void* pointer, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(pointer), "r"(value.x), "r"(value.y) : "memory");
}

// The compiler may not move this over a wait: what it overwrites is read by wgmma until then.
__device__ __forceinline__ uint4 load_metadata(const uint4* pointer) {
  uint4 value;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer)
               : "memory");
  return value;
}

// --- words as bytes

// Four bytes chosen from eight; a selector of 8 + i repeats the sign of byte i (__byte_perm cannot).
template <u32 SELECTOR>
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b) {
  u32 word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "n"(SELECTOR));
  return word;
}
