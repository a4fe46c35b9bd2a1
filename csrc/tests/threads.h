// std::thread instead of torch's threads.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#include "../step.h"

namespace rlekf::tests {

inline cpu::Parallel std_threads(int64_t num_workers) {
  return {num_workers, [num_workers](int64_t count, const std::function<void(int64_t)>& task) {
            std::vector<std::thread> threads;
            for (int64_t worker = 0; worker < num_workers; ++worker) {
              threads.emplace_back([=, &task] {
                for (int64_t i = worker; i < count; i += num_workers) task(i);
              });
            }
            for (std::thread& thread : threads) thread.join();
          }};
}

}  // namespace rlekf::tests
