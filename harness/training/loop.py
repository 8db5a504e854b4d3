"""The training loop, on one page."""

from __future__ import annotations

from harness.resilience.agreement import Agreement
from harness.training.run import Run


def run_steps(run: Run) -> None:
    """Run the loop, from the run's first step to its last. Raises Stopped and Diverged."""
    config = run.config
    agreement = Agreement(run.control, run.ask_every_s)
    batches = run.batches()
    for step in range(run.first_step, config.total_steps):
        done = run.take_step(step, batches)
        run.profile_step(done)  # synchronises, in its few steps
        stop, save = agreement.after_step(run.stop.signal is not None, run.checkpoint_is_due())
        epoch_ends = done % config.steps_per_epoch == 0
        if stop or save or epoch_ends or done % config.run.log_every_steps == 0:
            run.log_line(done)  # synchronises
        if stop or save or epoch_ends:
            run.save(done)  # synchronises; before the evaluation, which a resume makes up for
        if stop and done < config.total_steps:
            agreement.close()
            raise run.stopped(done)
        if epoch_ends and run.evaluation_is_due(done):
            run.evaluate(done)  # synchronises
    agreement.close()
