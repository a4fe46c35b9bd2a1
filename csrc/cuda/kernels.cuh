// The filter step on a GPU: one cooperative launch for all blocks.
//
//     visit        each thread block reads its run of tiles once: z_i += T x_j, z_j += T^T x_i; a fold also writes them
//     -- grid barrier --
//     reduce       adds the parts of z in a fixed order, subtracts the pending vectors; inner products with H
//     -- grid barrier --
//     recursion    the first thread block adds these up (many: all of them do, before another barrier) and runs the
//                  recursion over the M measurements on scalars
//     -- grid barrier --
//     apply        weights and new pending vectors
//
// `project` is visit, reduce and the sums of the third; `correct` is the recursion and apply. A step in float64 reads
// 4 n (n + 1) bytes and does 2 n (n + 1) floating-point operations; a GPU that reads 4.4 TB/s has time for 13 times as
// many. So all that counts is to keep reads in flight. The order of the tiles is in walk.h, addresses are in launch.h.

#pragma once

#include "recursion.cuh"
#include "reduce.cuh"
#include "task.cuh"
#include "visit.cuh"

namespace rlekf::cuda {

template <typename Scalar, int kM>
RLEKF_DEVICE void filter_step(const Task& task) {
  if (task.phases & kProject) {
    const Fold due = visit<Scalar, kM>(task);
    sync_threads();
    if (thread() == 0) note_fold(own_state(), due);
    sync_grid();
    reduce<kM>(task);
    sync_grid();
    gather_all<kM>(task);
  } else if (cta() == 0) {
    load_state(task);
  }
  if (cta() == 0) {
    if (task.phases & kCorrect) run_recursion<kM>(task);
    copy_state(own_state(), *task.p.state);
  }
  if (task.phases & kCorrect) {
    sync_grid();
    apply<kM>(task);
  }
}

}  // namespace rlekf::cuda
