"""Train a Llama on very long sequences: `python train.py --help`. Without flags, a tiny one learns in about a
minute."""

import dataclasses
import functools
import sys
import time

import tyro

from alst_jax.config import TrainConfig, UserError, check_run, typed_fields
from alst_jax.hardware import environment


def main() -> int:
    try:
        config = parse(sys.argv[1:])
        check_run(config)
        environment.prepare(config.simulate_devices, config.plan_for is not None, config.host_memory, config.devices)
        return run(config)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # jax's own errors are of this kind
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"\nerror: {out_of_memory(config, str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped at once: nothing was saved since the last checkpoint", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> TrainConfig:
    """The flags. A resumed run starts from the flags it began with; what is typed now changes them."""
    cli = lambda default: tyro.cli(TrainConfig, args=arguments, default=default)
    config = cli(TrainConfig())
    typed = typed_fields(cli, config)
    if config.resume and config.out is not None:
        from alst_jax.storage.checkpoint import read_run_file

        saved = read_run_file(config.out).get("flags", {})
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        saved = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in known}
        # The run has its model with it; one that is typed must be the same.
        config = cli(TrainConfig(**saved | {"model": None}))
        return dataclasses.replace(config, typed=tuple(sorted({*saved.get("typed", ()), *typed})))
    return with_demo_defaults(dataclasses.replace(config, typed=typed))


def out_of_memory(config: TrainConfig, reason: str) -> str:
    """What did not fit, and the flags that are left to try, cheapest first."""
    off = [f"--{name.replace('_', '-')}" for name in ("offload_optimizer", "offload_activations", "offload_weights")
           if not getattr(config, name)]
    off += [flag for flag, on in (
        ("--remat", config.remat), ("--tiled-loss", config.tiled_loss), ("--tiled-mlp", config.tiled_mlp),
        ("--optimizer-states int8", config.optimizer_states == "int8"), ("--head-chunks", config.head_chunks > 1),
        ("--segment-layers", config.segment_layers != (1,))) if not on]
    less = ", ".join([*off, "a larger --sp"])
    return (f"out of memory: {reason.strip().splitlines()[0][:300]}. These need less: {less}, or a shorter --seq-len. "
            "Checkpoints saved before are complete; go on from them with --resume")


def with_demo_defaults(config: TrainConfig) -> TrainConfig:
    """Without --model: a tiny Llama, simulated devices, sequence parallelism on; what was typed is kept."""
    if config.model is not None or config.resume or config.plan_for:
        return config
    sp = config.sp or 4
    demo = dict(sp=sp, simulate_devices=sp * (config.dp or 1), steps=80, seq_len=2048, learning_rate=3e-3,
                out=f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if config.find_max_seq_len:
        del demo["seq_len"]
    return dataclasses.replace(config, **{k: v for k, v in demo.items() if getattr(config, k) is None})


def subject(config: TrainConfig):
    """(model source, planner, job): what is trained or planned, where, and in which shapes; refuses what cannot be."""
    import jax

    from alst_jax import run as setup
    from alst_jax.parallel.mesh import choose_degrees
    from alst_jax.planning.job import Job
    from alst_jax.planning.planner import ANY_LENGTH, Planner, target
    from alst_jax.planning.process import with_room

    # ------------------------------------------------------------------------------------------- where: devices, mesh
    cluster = target(config)
    dp, sp = choose_degrees(config.dp, config.sp, cluster.devices if config.plan_for else jax.device_count())

    # -------------------------------------------------------------------------------------------------- what: the model
    source = setup.find_model(config, tokenizer=not config.planning)
    dtype = setup.choose_dtype(config)
    profile = setup.make_profile(config, dtype, source.config)
    seq_len = ANY_LENGTH if config.find_max_seq_len else setup.check_seq_len(config, source.config)
    job = Job(source.config, profile, dp * config.batch_size, setup.padded_length(seq_len, sp, profile), dp, sp,
              config.grad_accum, config.optimizer_states, config.master_weights)
    cluster = with_room(cluster, job)
    return source, Planner.of(config, cluster, functools.partial(setup.make_step, config, cluster, dtype)), job


def run(config: TrainConfig) -> int:
    """The story of a run, from flags to a Hugging Face directory. Returns the exit code."""
    # jax reads its environment when it is imported: not before main() has prepared it.
    from alst_jax.planning.report import announce_plan, planned_against_measured, report

    if config.planning:
        _, planner, job = subject(config)
        print(report(planner, job))
        return 0

    import jax

    from alst_jax import run as setup
    from alst_jax.data.batches import TrainingBatches, evaluation_batches, fingerprint
    from alst_jax.metrics import MetricsLog, peak_host_memory, peak_memory
    from alst_jax.models.hf_config import record_dtype
    from alst_jax.models.hf_weights import save_params
    from alst_jax.planning.process import make_host_pool
    from alst_jax.storage import checkpoint as ckpt
    from alst_jax.storage.saving import EXPORT_FILE
    from alst_jax.trainer import StopSignal, TrainState, train

    # ---------------------------------------------------------------------------------- where, what, and how: the plan
    out = setup.check_out(config)
    source, planner, job = subject(config)
    choice = None
    if planner.cluster is not None:  # what cannot fit is refused here, before anything is allocated
        choice = planner.choose(job)
        announce_plan(planner, choice)
        job = choice.job
    step = planner.step(job)
    seq_len, rows, padded_len, dtype = config.seq_len, job.rows, job.length, setup.choose_dtype(config)

    # ----------------------------------------------------------------------------------------------- on what: the data
    sequences, stats = setup.read_sequences(config, source, seq_len)
    pad_token = setup.pad_token(source.tokenizer)
    setup.check_enough(config, len(sequences), rows * config.grad_accum)
    data = TrainingBatches(sequences, padded_len, rows, config.grad_accum, config.seed, pad_token)
    eval_batches = None
    if config.eval_data is not None or config.model is None and not config.data:
        held_out, _ = setup.read_sequences(config, source, seq_len, held_out=True)
        eval_batches = functools.partial(evaluation_batches, held_out, padded_len, rows, pad_token)
    steps = config.steps or max(1, len(sequences) // (rows * config.grad_accum))

    # ------------------------------------------------------------------------------- from where: resume, load or draw
    geometry = {"data": fingerprint(sequences), "seed": config.seed, "rows": rows, "grad_accum": config.grad_accum,
                "seq_len": seq_len, "dtype": str(dtype), "optimizer_states": job.states,
                "master_weights": job.master}
    if choice is not None:
        environment.return_freed_memory()
        make_host_pool(choice.plan)
    if config.resume:
        _, at = ckpt.find_checkpoint(out)
        checkpoints = ckpt.Checkpoints(out, config.keep_checkpoints, clean=True)
        loop = checkpoints.restore_loop(at)
        ckpt.check_same_model(setup.saved_model(out), source.config)
        setup.check_geometry(loop["geometry"], geometry)
        state = TrainState(checkpoints.restore_params(at, step.params),
                           checkpoints.restore_optimizer(at, step.optimizer_state), loop["step"])
        data.set_state(loop["data"])
    else:
        params = setup.load_weights(source, step, dtype, config.seed)  # may refuse: nothing is written before
        setup.start_run_directory(out, config, source)
        checkpoints = ckpt.Checkpoints(out, config.keep_checkpoints, clean=True)
        state = TrainState(params, step.init_optimizer(params), 0)

    # --------------------------------------------------------------------------------------------------------- the loop
    setup.announce(config, source, step, stats, seq_len, padded_len, steps, state.step, str(out))
    log = MetricsLog(out, state.step)

    def save(state: TrainState) -> None:
        loop = {"step": state.step, "data": data.get_state(), "seed": config.seed, "geometry": geometry}
        checkpoints.save(state.step, state.params, state.optimizer, loop)

    learning_rate = config.learning_rate or 1e-5
    with StopSignal() as stop:  # until all is written: a first signal cuts nothing off
        try:
            state = train(config, step, state, steps, learning_rate, data, eval_batches, log, save, stop)
        finally:
            checkpoints.close()
            log.close()
        if choice is not None and log.seconds:
            print(planned_against_measured(choice, peak_memory()[1], peak_host_memory(), log.seconds), flush=True)
        if stop.received is not None and state.step < steps:
            print(f"stopped by {stop.received.name}; step {state.step} is saved. Go on with: "
                  f"python train.py --resume --out {out}")
            return 128 + stop.received

        # --------------------------------------------------------------------------------------------------- the export
        if config.export:
            target = out / ckpt.EXPORT
            ckpt.copy_model_files(out / ckpt.MODEL, target)
            save_params(jax.tree_util.tree_leaves_with_path(state.params), source.config, target, EXPORT_FILE)
            record_dtype(target, str(dtype))
            print(f"wrote {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
