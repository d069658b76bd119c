// Sums and gathers over the ranks of one host, through one region of memory that each of them has mapped.
//
// The region has, for every rank, a line of state and two buffers, and only that rank writes them. A message is cut into
// pieces that fit a buffer; pieces take the two buffers in turns, and each has a barrier: a rank that writes a buffer
// again has passed the barrier of the piece between, which every rank reaches only after it has read that buffer. So one
// barrier is enough for a small piece, of which every rank sums all ranks' copies by itself. Of a large one each rank
// sums a slice into its own buffer, and after a second barrier all ranks copy all slices.
//
// Sums are made in float32, in the order of the ranks, by one rank or by the same code: every rank has the same bits.
// A rank that waits busy-waits briefly, then yields its core to ranks that share it, then sleeps between looks.

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t LINE = 128;           // bytes that no two ranks write to: a cache line and the one fetched with it
constexpr int64_t PAGE = 4096;          // buffers start at such a multiple
constexpr int64_t BUFFER = 1 << 20;     // bytes of a piece at most: two of them stay in a core's cache
constexpr int64_t SMALL = 1 << 14;      // bytes up to which summing all copies costs less than a second barrier
constexpr int64_t BLOCK = 512;          // values summed at a time, in the innermost cache
constexpr int SPINS = 200, YIELDS = 2000;   // looks before a waiting rank yields its core, and then before it sleeps
constexpr int LOOKS = 1000;             // looks between two at the clock and at the others' processes: about 0.1 s
constexpr std::chrono::microseconds NAP{50};

using Clock = std::chrono::steady_clock;

// What a rank says of itself. phase: barriers it has reached. what, bytes: of the piece in either of its buffers.
struct alignas(LINE) State {
  std::atomic<uint64_t> phase;
  struct {
    int64_t what, bytes;
  } piece[2];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(State) == LINE);

int64_t header_bytes(int64_t ranks) {  // its first line is the caller's
  return (LINE * (1 + ranks) + PAGE - 1) / PAGE * PAGE;
}

int64_t region_bytes(int64_t ranks) { return header_bytes(ranks) + 2 * ranks * BUFFER; }

struct Region {
  char* memory;
  int place;                  // of this rank in the group
  std::vector<int64_t> names, pids;  // of each place: the rank of the whole job, and its process
  double timeout_s;
  uint64_t phase = 0, pieces = 0;
  bool broken = false;

  ~Region() { munmap(memory, region_bytes(size())); }

  int size() const { return static_cast<int>(pids.size()); }
  int turn() const { return static_cast<int>(pieces % 2); }
  State& state(int r) const { return *reinterpret_cast<State*>(memory + LINE * (1 + r)); }
  char* buffer(int r) const { return memory + header_bytes(size()) + (2 * r + turn()) * BUFFER; }
  std::string name(int r) const { return c10::str("rank ", names[r], " (process ", pids[r], ")"); }

  template <typename... Words>
  [[noreturn]] void fail(const Words&... words) {
    broken = true;
    TORCH_CHECK(false, words...);
  }

  // As `fail`, which Python sees as a ValueError: every rank of the group raises it.
  template <typename... Words>
  [[noreturn]] void fail_everywhere(const Words&... words) {
    broken = true;
    TORCH_CHECK_VALUE(false, words...);
  }

  // Put this rank's bytes where the others read them, and wait for theirs.
  void share(int64_t what, const void* from, int64_t bytes) {
    TORCH_CHECK(!broken, "this group's shared memory cannot be used after an error in it");
    ++pieces;
    std::memcpy(buffer(place), from, bytes);
    state(place).piece[turn()] = {what, bytes};
    barrier();
    for (int r = 0; r < size(); ++r) {
      const auto theirs = state(r).piece[turn()];
      if (theirs.what != what || theirs.bytes != bytes)
        fail_everywhere("the ranks do not run the same steps: ", name(r), " shares ", theirs.bytes, " bytes (kind ",
                        theirs.what, "), this rank ", bytes, " (kind ", what, ")");
    }
  }

  void barrier() {
    state(place).phase.store(++phase, std::memory_order_release);
    for (int r = 0; r < size(); ++r) await(r);
  }

  bool has_come(int r) const { return state(r).phase.load(std::memory_order_acquire) >= phase; }

  void await(int r) {
    for (int i = 0; i < SPINS; ++i) {
      if (has_come(r)) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    for (int i = 0; i < YIELDS; ++i) {
      if (has_come(r)) return;
      sched_yield();
    }
    const auto began = Clock::now();
    for (int i = 1; !has_come(r); ++i) {
      std::this_thread::sleep_for(NAP);
      if (i % LOOKS == 0) look(r, std::chrono::duration<double>(Clock::now() - began).count());
    }
  }

  // Raises where some rank that is awaited is gone, or r has been for too long.
  void look(int r, double waited_s) {
    for (int other = 0; other < size(); ++other)
      if (!has_come(other) && is_gone(pids[other]) && !has_come(other))  // its last act may have been to come
        fail(name(other), " died while this rank waited for it in a collective");
    if (waited_s > timeout_s) fail(name(r), " has not come to a collective for ", static_cast<int64_t>(waited_s), " s");
  }

  static bool is_gone(int64_t pid) {
    if (kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH) return true;
    std::ifstream file(c10::str("/proc/", pid, "/stat"));  // "pid (name) state ...": ended, and its parent has not seen?
    std::string line;
    std::getline(file, line);
    const auto at = line.rfind(") ");
    return at != std::string::npos && at + 2 < line.size() && (line[at + 2] == 'Z' || line[at + 2] == 'X');
  }
};

std::array<std::atomic<Region*>, 1024> regions{};
std::mutex opening;

Region& region_of(int64_t handle) {
  Region* region = handle >= 0 && handle < static_cast<int64_t>(regions.size()) ? regions[handle].load() : nullptr;
  TORCH_CHECK(region, "no shared memory is open under handle ", handle);
  return *region;
}

// Maps a file of region_bytes() zeros (its first LINE bytes may be anything); the caller closes it. -> handle
int64_t region_open(int64_t file, int64_t place, at::IntArrayRef names, at::IntArrayRef pids, double timeout_s) {
  const auto ranks = static_cast<int64_t>(pids.size());
  TORCH_CHECK(0 <= place && place < ranks && names.size() == pids.size(), "place ", place, " of ", ranks, " ranks");
  struct stat facts {};
  TORCH_CHECK(fstat(static_cast<int>(file), &facts) == 0 && facts.st_size == region_bytes(ranks),
              "the file to share is not of ", region_bytes(ranks), " bytes");
  const std::lock_guard<std::mutex> lock(opening);
  auto free = std::find_if(regions.begin(), regions.end(), [](auto& region) { return !region.load(); });
  TORCH_CHECK(free != regions.end(), "more than ", regions.size(), " regions of shared memory");
  void* memory = mmap(nullptr, region_bytes(ranks), PROT_READ | PROT_WRITE, MAP_SHARED, static_cast<int>(file), 0);
  TORCH_CHECK(memory != MAP_FAILED, "mmap of ", region_bytes(ranks), " bytes: ", std::strerror(errno));
  free->store(new Region{static_cast<char*>(memory), static_cast<int>(place), names.vec(), pids.vec(), timeout_s});
  return free - regions.begin();
}

void region_close(int64_t handle) {
  region_of(handle);
  delete regions[handle].exchange(nullptr);
}

// to[i] = sum over ranks of parts[r][i], for i in [from, until). `to` may be one of the parts.
template <typename T>
void sum(T* to, const std::vector<const T*>& parts, int64_t from, int64_t until) {
  float total[BLOCK];
  for (int64_t at = from; at < until; at += BLOCK) {
    const int64_t n = std::min(BLOCK, until - at);
    for (int64_t i = 0; i < n; ++i) total[i] = static_cast<float>(parts[0][at + i]);
    for (size_t r = 1; r < parts.size(); ++r)
      for (int64_t i = 0; i < n; ++i) total[i] += static_cast<float>(parts[r][at + i]);
    for (int64_t i = 0; i < n; ++i) to[at + i] = static_cast<T>(total[i]);
  }
}

template <typename T>
void all_reduce_piece(Region& region, T* x, int64_t count) {
  const int ranks = region.size();
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  region.share(static_cast<int64_t>(c10::CppTypeToScalarType<T>::value), x, bytes);
  std::vector<T*> parts(ranks);
  for (int r = 0; r < ranks; ++r) parts[r] = reinterpret_cast<T*>(region.buffer(r));
  const std::vector<const T*> sources(parts.begin(), parts.end());
  if (bytes <= SMALL) return sum(x, sources, 0, count);
  const auto cut = [&](int r) { return r == ranks ? count : count * r / ranks / LINE * LINE; };
  sum(parts[region.place], sources, cut(region.place), cut(region.place + 1));
  region.barrier();
  for (int r = 0; r < ranks; ++r) std::memcpy(x + cut(r), parts[r] + cut(r), (cut(r + 1) - cut(r)) * sizeof(T));
}

template <typename T>
void all_reduce_as(Region& region, T* x, int64_t count) {
  constexpr int64_t most = BUFFER / sizeof(T);
  for (int64_t at = 0; at < count; at += most) all_reduce_piece(region, x + at, std::min(most, count - at));
}

void check(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "a contiguous tensor is needed, not one of strides ", x.strides());
}

// Sum of x over the ranks, in place: float32, bfloat16 or float16, contiguous.
void all_reduce_(at::Tensor& x, int64_t handle) {
  check(x);
  Region& region = region_of(handle);
  switch (x.scalar_type()) {
    case at::kFloat: return all_reduce_as(region, x.data_ptr<float>(), x.numel());
    case at::kBFloat16: return all_reduce_as(region, x.data_ptr<at::BFloat16>(), x.numel());
    case at::kHalf: return all_reduce_as(region, x.data_ptr<at::Half>(), x.numel());
    default: TORCH_CHECK(false, "all_reduce_ sums float32, bfloat16 and float16, not ", x.scalar_type());
  }
}

// out[r] = rank r's x, whose bytes are moved whatever the dtype; out has ranks * x.numel() values, both contiguous.
void all_gather_(at::Tensor& out, const at::Tensor& x, int64_t handle) {
  check(x);
  check(out);
  Region& region = region_of(handle);
  TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == region.size() * x.numel(), "all_gather_ of ",
              region.size(), " ranks: ", out.numel(), " values of ", out.scalar_type(), " for ", x.numel(), " of ",
              x.scalar_type());
  const int64_t bytes = static_cast<int64_t>(x.nbytes());
  const auto* from = static_cast<const char*>(x.data_ptr());
  auto* to = static_cast<char*>(out.data_ptr());
  for (int64_t at = 0; at < bytes; at += BUFFER) {
    const int64_t n = std::min(BUFFER, bytes - at);
    region.share(-1, from + at, n);
    for (int r = 0; r < region.size(); ++r) std::memcpy(to + r * bytes + at, region.buffer(r), n);
  }
}

// What torch.compile runs to learn shapes: nothing but the arguments' changes, which the schema tells.
void all_reduce_meta(at::Tensor& x, int64_t) { check(x); }
void all_gather_meta(at::Tensor& out, const at::Tensor& x, int64_t) {
  check(x);
  check(out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qwenvl_tp, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order};
  m.def("region_bytes(int ranks) -> int", &region_bytes);
  m.def("region_open(int file, int place, int[] names, int[] pids, float timeout_s) -> int", &region_open);
  m.def("region_close(int handle) -> ()", &region_close);
  m.def("all_reduce_(Tensor(a!) x, int region) -> ()", tags);
  m.def("all_gather_(Tensor(a!) out, Tensor x, int region) -> ()", tags);
}
TORCH_LIBRARY_IMPL(qwenvl_tp, CPU, m) {
  m.impl("all_reduce_", &all_reduce_);
  m.impl("all_gather_", &all_gather_);
}
TORCH_LIBRARY_IMPL(qwenvl_tp, Meta, m) {
  m.impl("all_reduce_", &all_reduce_meta);
  m.impl("all_gather_", &all_gather_meta);
}
