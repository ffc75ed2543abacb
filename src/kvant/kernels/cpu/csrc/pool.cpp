#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvant {

namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31, kInside = kOpen - 1;
constexpr int kSpins = 4000;       // some 50 microseconds, longer than what lies between two jobs of a step
constexpr int kPoliteSpins = 500;  // before the caller lets others run while it waits
constexpr int64_t kAlignment = 64, kHugePage = int64_t{1} << 21;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Null where the system refuses; else in huge pages, if it has them: a step writes all over its memory, and waits less
// for the translation of addresses.
char* allocate(int64_t size) {
  void* data = std::aligned_alloc(kHugePage, size);
#if defined(__linux__)
  if (data) madvise(data, size, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(data);
}

}  // namespace

#if defined(__x86_64__)
FlushTiny::FlushTiny() : state_(_mm_getcsr()) { _mm_setcsr(state_ | _MM_FLUSH_ZERO_ON); }
FlushTiny::~FlushTiny() { _mm_setcsr(state_); }
#else
FlushTiny::FlushTiny() : state_(0) {}
FlushTiny::~FlushTiny() {}
#endif

void* Arena::bytes(int64_t size) {
  size = round_up(size, kAlignment);
  while (slab_ < slabs_.size() && used_ + size > slabs_[slab_].size) {
    ++slab_;
    used_ = 0;
  }
  if (slab_ == slabs_.size()) {
    const int64_t length = round_up(std::max(size, kAlignment), kHugePage);
    char* data = allocate(length);
    if (!data) throw std::bad_alloc();
    slabs_.push_back({data, length});
  }
  void* start = slabs_[slab_].data + used_;
  used_ += size;
  return start;
}

// Several slabs become one of their size, so that the next call finds its memory in one piece.
void Arena::reset() {
  if (slabs_.size() > 1) {
    int64_t total = 0;
    for (const Slab& slab : slabs_) {
      total += slab.size;
      std::free(slab.data);
    }
    slabs_.clear();
    if (char* data = allocate(total)) slabs_.push_back({data, total});
  }
  slab_ = 0;
  used_ = 0;
}

Arena::~Arena() {
  for (const Slab& slab : slabs_) std::free(slab.data);
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::grow(int threads) {
  while (static_cast<int>(shares_.size()) < threads) shares_.emplace_back();
  while (static_cast<int>(workers_.size()) < threads - 1) {
    const int index = static_cast<int>(workers_.size()) + 1;
    workers_.emplace_back([this, index] { loop(index); });
  }
}

void Pool::start(int threads, int64_t units, Function function, void* context) {
  function_ = function;
  context_ = context;
  for (int64_t i = 0; i < threads; ++i)
    shares_[i].units.store((units * i / threads) << 32 | units * (i + 1) / threads, std::memory_order_relaxed);
  limit_.store(threads, std::memory_order_relaxed);
  const uint64_t job = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
  gate_.store(job << 32 | kOpen);
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> guard(mutex_);
    wake_.notify_all();
  }
  work_on(0);
  gate_.fetch_and(~kOpen);
  for (int spins = 0; gate_.load(std::memory_order_acquire) & kInside; ++spins) {
    if (spins < kPoliteSpins) pause();
    else std::this_thread::yield();
  }
  if (failed_.exchange(false)) throw std::bad_alloc();
}

bool Pool::Share::take_first(int64_t* unit) {
  uint64_t now = units.load(std::memory_order_relaxed);
  while ((now >> 32) < (now & 0xffffffff)) {
    *unit = static_cast<int64_t>(now >> 32);
    if (units.compare_exchange_weak(now, now + (uint64_t{1} << 32), std::memory_order_relaxed)) return true;
  }
  return false;
}

bool Pool::Share::take_last(int64_t* unit) {
  uint64_t now = units.load(std::memory_order_relaxed);
  while ((now >> 32) < (now & 0xffffffff)) {
    *unit = static_cast<int64_t>(now & 0xffffffff) - 1;
    if (units.compare_exchange_weak(now, now - 1, std::memory_order_relaxed)) return true;
  }
  return false;
}

void Pool::work_on(int index) {
  const int threads = limit_.load(std::memory_order_relaxed);
  try {
    int64_t unit;
    while (shares_[index].take_first(&unit)) function_(context_, unit, index);
    for (int other = 1; other < threads; ++other)
      while (shares_[(index + other) % threads].take_last(&unit)) function_(context_, unit, index);
  } catch (const std::bad_alloc&) {
    failed_ = true;  // told by the caller, when nobody works on the job any more
  }
}

bool Pool::enter(int index, uint64_t* done) {
  uint64_t gate = gate_.load(std::memory_order_acquire);
  while ((gate >> 32) != *done && (gate & kOpen) && index < limit_.load(std::memory_order_relaxed)) {
    if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) {
      *done = gate >> 32;
      return true;
    }
  }
  return false;
}

bool Pool::wait_for_job(uint64_t done) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (stop_.load(std::memory_order_relaxed)) return false;
    if ((gate_.load(std::memory_order_relaxed) >> 32) != done) return true;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers_;
  wake_.wait(lock, [&] { return stop_.load() || (gate_.load() >> 32) != done; });
  --sleepers_;
  return !stop_;
}

void Pool::loop(int index) {
  const FlushTiny flush;
  uint64_t done = 0;
  while (wait_for_job(done)) {
    if (enter(index, &done)) {
      work_on(index);
      gate_.fetch_sub(1, std::memory_order_release);
    } else {
      done = gate_.load() >> 32;  // closed already, or not for this thread
    }
  }
}

namespace {

struct Shared {
  std::mutex turn;
  std::atomic<int> waiting{0};  // for the turn
  Pool pool;
  Arena arena;
};

// Never destroyed: a daemon thread may still compute while the process ends.
Shared& shared() {
  static Shared* one = new Shared;
  return *one;
}

std::unique_lock<std::mutex> take_turn() {
  ++shared().waiting;
  std::unique_lock<std::mutex> turn(shared().turn);
  --shared().waiting;
  return turn;
}

}  // namespace

bool Turn::is_awaited() { return shared().waiting > 0; }

Turn::Turn(int threads)
    : lock_(take_turn()), threads_(threads < 1 ? 1 : threads), pool_(shared().pool), arena_(shared().arena) {
  pool_.grow(threads_);
  arena_.reset();
}

}  // namespace kvant
