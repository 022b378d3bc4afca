// Graphs of the stand-in driver: what is put on a stream that captures is kept, with its arguments, and done
// at each launch. What a driver refuses during a capture is refused, and voids the capture: waiting for the
// stream, copies between it and pageable memory, and, by the thread that captures, whatever may wait for the
// device (allocating, freeing, loading kernels, asking for events).
#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

enum {
  ILLEGAL_STATE = 401, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903,
  CAPTURE_WRONG_THREAD = 908,
};

/// A piece of a stream's work; what it gives is a code of the driver.
using Work = std::function<int()>;
struct Graph { std::vector<Work> nodes; };
struct Capture { Graph graph; std::thread::id thread; bool of_thread, void_; };

/// Of the streams that this thread captures, in a mode that watches the thread.
thread_local std::vector<Capture*> captures;

/// A copy of a kernel's arguments, as the array of pointers that a launch takes.
struct Arguments {
  explicit Arguments(const unsigned* sizes, void** from) {
    for (size_t i = 0; sizes[i]; ++i) {
      slots.emplace_back((sizes[i] + 63) / 64);
      memcpy(slots.back().data(), from[i], sizes[i]);
    }
  }
  int with(const std::function<int(void**)>& f) {
    std::vector<void*> pointers;
    for (auto& slot : slots) pointers.push_back(slot.data());
    return f(pointers.data());
  }

 private:
  struct alignas(64) Line { unsigned char bytes[64]; };
  std::vector<std::vector<Line>> slots;
};

int say(int code, const char* format, ...);

/// Refuses what may wait for the device while this thread captures.
int permitted(const char* call) {
  if (captures.empty()) return 0;
  for (Capture* c : captures) c->void_ = true;
  return say(CAPTURE_UNSUPPORTED, "%s while this thread captures a stream", call);
}

/// Refuses what waits for a stream while it captures.
int settled(Capture* capture, const char* call) {
  if (!capture) return 0;
  capture->void_ = true;
  return say(CAPTURE_UNSUPPORTED, "%s a stream that captures", call);
}

/// Does work of a stream now, or keeps it for the graph.
int put(Capture* capture, Work work) {
  if (!capture) return work();
  if (capture->void_) return CAPTURE_INVALIDATED;
  capture->graph.nodes.push_back(std::move(work));
  return 0;
}

int begin(Capture** capture, int mode) {
  if (*capture) return say(ILLEGAL_STATE, "a stream captures already");
  *capture = new Capture{{}, std::this_thread::get_id(), mode != 2, false};
  if ((*capture)->of_thread) captures.push_back(*capture);
  return 0;
}

int end(Capture** capture, Graph** graph) {
  *graph = nullptr;
  if (!*capture) return say(ILLEGAL_STATE, "the end of a capture that did not begin");
  if ((*capture)->of_thread && (*capture)->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
  captures.erase(std::remove(captures.begin(), captures.end(), *capture), captures.end());
  const bool whole = !(*capture)->void_;
  if (whole) *graph = new Graph(std::move((*capture)->graph));
  delete *capture;
  *capture = nullptr;
  return whole ? 0 : CAPTURE_INVALIDATED;
}

int run(const Graph& graph) {
  for (const Work& work : graph.nodes)
    if (int code = work()) return code;
  return 0;
}

}  // namespace
