"""Phases of a run, by the functions that it calls meanwhile."""

START, OTHER = "start-up", "between phases"
WHOLE = ("warm-up", "measurement")  # phases whose parts do not count as phases
PHASES = {  # what a run is in while it calls one of these: the innermost counts; START before its first step
    START: ["train.startup:loaded", "train.startup:fresh", "train.population.training:begun"],
    "warm-up": ["train.reference:warm_up"],
    "measurement": ["train.startup:measure", "train.startup:samples_under", "train.population.training:_measure"],
    "sampling": [
        "train.loop:start_rollout",
        "sampling.rollout:collect",
        "train.population.step:start_rollouts",
        "train.population.step:collect",
    ],
    "scoring": ["train.loop:scored_batches", "train.population.step:scored_batches"],
    "update": [
        "train.loop:compile_update",
        "train.loop:update_unless_ended",
        "train.step_log:fetch",
        "train.population.step:update",
        "toy.training:grid",
        "toy.study:run",
    ],
    "rows": ["train.step_log:StepLog.write"],
    "evaluation": ["train.held_out:Evaluations.measure"],
    "checkpoint": ["train.checkpoint:Checkpoints.save", "train.host_state:save"],
    "resuming": ["train.checkpoint:Checkpoints.restore", "train.outputs:opened"],
    "export": ["train.trained:write_end", "hf:export"],
    "report": [
        "train.summary:final_figure",
        "train.summary:final_table",
        "train.population.report:show_end",
        "toy.run_figure:save_figure",
        "toy.phase_diagram:diagram",
    ],
}
LASTING = [name for name in PHASES if name != "rows"]  # those in which a kill can be aimed
