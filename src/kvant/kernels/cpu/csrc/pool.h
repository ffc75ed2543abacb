// The process's one pool of threads, and the memory that a call works in.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace kvant {

// Memory for one call, given out in order and taken back all at once.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  // What was taken after `mark` is given back by `rewind`.
  struct Mark {
    size_t slab;
    int64_t used;
  };
  Mark mark() const { return {slab_, used_}; }
  void rewind(Mark mark) { slab_ = mark.slab, used_ = mark.used; }
  void reset();
  ~Arena();

 private:
  void* bytes(int64_t size);
  struct Slab {
    char* data;
    int64_t size;
  };
  std::vector<Slab> slabs_;
  size_t slab_ = 0;
  int64_t used_ = 0;
};

// Threads that spin for a short while after work, then sleep. Each has a share of the units, in order, so that it reads
// on where it was; who is through with its own takes others', from their ends. So a thread that the system holds up
// holds up one unit at most; one that it has not even woken is not waited for.
class Pool {
 public:
  ~Pool();
  // Starts workers so that `threads` in all, the caller's included, can work. Throws system_error where one does not
  // start.
  void grow(int threads);

  // body(unit), or body(unit, thread), for every unit in [0, units), on at most `threads` threads, which have the
  // numbers below that; returns when all are done. Throws bad_alloc where one did.
  template <class Body>
  void run(int threads, int64_t units, Body&& body) {
    if (threads < 2 || units < 2) {
      for (int64_t unit = 0; unit < units; ++unit) call(body, unit, 0);
      return;
    }
    using Plain = std::remove_reference_t<Body>;
    const Function function = [](void* context, int64_t unit, int thread) {
      call(*static_cast<Plain*>(context), unit, thread);
    };
    start(threads, units, function, &body);
  }

 private:
  template <class Body>
  static void call(Body& body, int64_t unit, int thread) {
    if constexpr (std::is_invocable_v<Body&, int64_t, int>) body(unit, thread);
    else body(unit);
  }

  using Function = void (*)(void*, int64_t unit, int thread);
  void start(int threads, int64_t units, Function function, void* context);
  void work_on(int index);
  void loop(int index);
  bool enter(int index, uint64_t* done);
  bool wait_for_job(uint64_t done);

  // A thread's units that nobody has taken yet: next << 32 | end.
  struct alignas(64) Share {
    std::atomic<uint64_t> units{0};
    bool take_first(int64_t* unit);
    bool take_last(int64_t* unit);
  };

  // The gate: job number << 32 | open << 31 | threads inside.
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};  // a unit ran out of memory
  Function function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int> limit_{0};
  std::deque<Share> shares_;  // one for each thread, the caller's first
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// While it lives, the thread's results too small for full precision become 0: computing with them is slow, and nothing
// here needs them. Such inputs keep their value.
class FlushTiny {
 public:
  FlushTiny();
  ~FlushTiny();
  FlushTiny(const FlushTiny&) = delete;
  FlushTiny& operator=(const FlushTiny&) = delete;

 private:
  unsigned state_;
};

// One call's turn: engines that share the process take turns at the pool instead of crowding the cores.
class Turn {
 public:
  explicit Turn(int threads);
  template <class Body>
  void run(int64_t units, Body&& body) {
    pool_.run(threads_, units, body);
  }
  // Whether somebody waits for a turn. Who has had one and takes another at once would always be first.
  static bool is_awaited();
  int threads() const { return threads_; }
  Arena& arena() { return arena_; }

 private:
  FlushTiny flush_;
  std::unique_lock<std::mutex> lock_;
  int threads_;
  Pool& pool_;
  Arena& arena_;
};

}  // namespace kvant
