"""Train a Llama on very long sequences: `python train.py --help`. Without flags, a tiny one learns in a minute."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

from alst_jax.config import TrainConfig, UserError, chosen_fields, parse_flags
from alst_jax.data_flags import read_saved
from alst_jax.declare import check_saved
from alst_jax.flag_checks import check_run
from alst_jax.hardware import environment
from alst_jax.process_flags import ProcessFlags
from alst_jax.processes import start
from alst_jax.processes.hang import seconds_for, within
from alst_jax.processes.link import link
from alst_jax.processes.server import UNREAD


def main() -> int:
    config = TrainConfig()
    try:
        config, given = parse_flags(sys.argv[1:])
        start.join(config)  # before the run directory is read: if one process cannot see it, all end
        config = completed(config, given)
        if config.explain_run is not None:
            from alst_jax.storage.about import explain

            print(explain(config.explain_run))
            return 0
        check_run(config, link().several)
        environment.prepare(
            config.simulate_devices,
            config.plan_for is not None,
            config.host_memory,
            config.devices,
            config.deterministic,
            start.sharing(),
            config.profile_steps is not None,
        )
        start.start_jax(config, environment.visible_gpus)
        code = run(config) if config.show_samples is None else show_samples(config)
        start.finish()
        return code
    except UserError as error:
        return link().failed(f"error: {error}", 2)
    except RuntimeError as error:  # jax's own errors are of this kind
        if "RESOURCE_EXHAUSTED" not in str(error):
            link().crashed(error)
            raise
        return link().failed(f"error: {out_of_memory(config, str(error))}", 2)
    except BrokenPipeError:
        raise  # while_read explains it
    except OSError as error:
        from alst_jax.storage import disk

        return link().failed(f"error: {disk.stopped(disk.disk_error(error) or error, config.out)}", 2)
    except KeyboardInterrupt:
        return link().failed("stopped at once: nothing was saved since the last checkpoint", 130)
    except Exception as error:
        link().crashed(error)
        raise


def parse(arguments: list[str]) -> TrainConfig:
    """The flags of a command line."""
    return completed(*parse_flags(arguments))


def completed(config: TrainConfig, given: set[str]) -> TrainConfig:
    """The flags, with the values that follow from other flags. A resumed run starts from the
    flags it began with; flags typed now change them. given: the fields that were typed."""
    typed = tuple(name for name in chosen_fields() if name in given)
    if config.resume and config.out is not None:
        from alst_jax.storage.run_directory import read_run_file

        saved = read_saved(read_run_file(config.out).get("flags", {}))
        check_saved(TrainConfig, saved, f"{config.out}/run.json")
        # The run has its model with it; a typed one must be the same.
        saved |= {"model": None, "typed": tuple(sorted({*saved.get("typed", ()), *typed}))}
        saved |= {field.name: getattr(config, field.name) for field in dataclasses.fields(ProcessFlags)}
        return TrainConfig(**saved | {name: getattr(config, name) for name in given})
    if config.random_weights and "export" not in given:
        config = dataclasses.replace(config, export=False)
    # The date is one of the run's flags, so that a run resumed on another day renders the same chats.
    today = config.template_date or link().told("date", lambda: time.strftime("%Y-%m-%d"))
    return with_demo_defaults(dataclasses.replace(config, typed=typed, template_date=today))


def out_of_memory(config: TrainConfig, reason: str, job=None) -> str:
    """The allocation that did not fit, and the flags that are left to try, cheapest first. job: with the profile that
    ran, which --memory auto may have chosen; None: the flags' profile."""
    profile = config.profile("xla", "float32") if job is None else job.profile
    off = [
        f"--{name.replace('_', '-')}"
        for name in ("offload_optimizer", "offload_activations", "offload_weights")
        if not getattr(profile, name)
    ]
    off += [
        flag
        for flag, on in (
            ("--remat", profile.remat),
            ("--tiled-loss", profile.loss_tile is not None),
            ("--tiled-mlp", profile.mlp_tile is not None),
            ("--optimizer-states int8", (config.optimizer_states if job is None else job.states) == "int8"),
            ("--head-chunks", profile.head_chunks > 1),
            ("--segment-layers", profile.segment_layers != (1,)),
        )
        if not on
    ]
    off += [
        f"fewer --{name.replace('_', '-')}"
        for name in ("keep_mlp_on_device", "keep_qkv_on_device", "keep_attention_on_device")
        if getattr(profile, name)
    ]
    less = ", ".join([*off, "a larger --sp"])
    words = f"out of memory: {reason.strip().splitlines()[0][:300]}. "
    if job is not None and config.memory == "auto":
        from alst_jax.planning.job import describe

        words += f"The step ran with {describe(job)} (--memory auto keeps what is typed). "
    return (
        f"{words}These need less: {less}, or a shorter --seq-len. Checkpoints saved before are complete; go on "
        "from them with --resume"
    )


@contextlib.contextmanager
def naming_the_profile(config: TrainConfig, job) -> Iterator[None]:
    """An out of memory inside is a UserError that knows the profile of the job."""
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory(config, str(error), job)) from error


def with_demo_defaults(config: TrainConfig) -> TrainConfig:
    """Without --model: a tiny Llama, simulated devices, sequence parallelism on; typed flags are kept."""
    if config.model is not None or config.resume or config.plan_for:
        return config
    sp = config.sp or 4
    demo = dict(
        sp=sp,
        simulate_devices=-(-sp * (config.dp or 1) // link().count),
        steps=80,
        seq_len=2048,
        learning_rate=3e-3,
        out=link().told("out", lambda: f"runs/{time.strftime('%Y%m%d-%H%M%S')}"),
    )
    if config.find_max_seq_len:
        del demo["seq_len"]
    return dataclasses.replace(config, **{k: v for k, v in demo.items() if getattr(config, k) is None})


def show_samples(config: TrainConfig) -> int:
    """Print samples of the data with their learned tokens marked. Returns the exit code."""
    from alst_jax import run_data

    run_data.show_samples(config)
    return 0


def run(config: TrainConfig) -> int:
    """One run, from flags to a Hugging Face directory. Returns the exit code."""
    # jax reads its environment when it is imported: not before main() has prepared it.
    from alst_jax import run as setup
    from alst_jax import run_data, run_long, run_lora, run_packs, run_report, run_state
    from alst_jax.metrics import MetricsLog, NoLog, peak_host_memory, peak_memory
    from alst_jax.planning.report import announce_plan, planned_against_measured, report
    from alst_jax.processes.stop import StopSignal
    from alst_jax.refused import Saves
    from alst_jax.storage import run_directory
    from alst_jax.storage.parts import Loop
    from alst_jax.trainer import train

    # ------------------------------------------------------------------------- what, where and how: the model, the plan
    config = run_lora.with_adapter(config)
    out = None if config.planning else pathlib.Path(config.out or ".")
    if not config.planning and link().first:
        run_directory.check_out(config)
    source, planner, job = setup.subject(config)
    link().same("the model's config.json", repr(source.config))
    if config.planning:
        print(report(planner, job))
        return 0
    choice, read = None, None
    run_state.check_before_data(config, job, setup.choose_dtype(config))
    if config.pack:  # the packs say how much attention is to compute
        read = link().in_turn("data", lambda: run_data.read_data(config, source, job))
        job = run_packs.with_packs(job, read[1])
    if planner.cluster is not None:  # a run that does not fit is refused here, before it allocates memory
        started = time.perf_counter()
        choice = planner.choose(job)
        announce_plan(planner, choice, time.perf_counter() - started)
        job = choice.job
        link().same("the memory profile that --memory auto chooses (name it, or --host-memory)", repr(job.profile))
    step = planner.step(job)

    # ----------------------------------------------------------------------------------------------- on what: the data
    data, stats, fingerprint = read or link().in_turn("data", lambda: run_data.read_data(config, source, job))
    link().same("the data (--data)", fingerprint)
    data = link().in_turn("--eval-long", lambda: run_long.with_evaluation(config, source, job, data))
    steps = config.steps or max(1, stats.sequences // (job.rows * job.grad_accum))

    # ------------------------------------------------------------------------------- from where: resume, load or draw
    geometry = run_state.geometry(config, job, setup.choose_dtype(config), fingerprint)
    if choice is not None:
        environment.return_freed_memory()
        run_state.make_host_pool(choice.plan)
    if config.check_numerics:
        run_data.preflight(config, step, job, data)
    size = run_state.size_of(step)
    with within("loading the weights or the checkpoint", seconds_for(size)):
        checkpoints, state = run_state.begin(config, source, step, data, geometry)
    if state.step > steps:
        raise UserError(
            f"--resume: the newest checkpoint is of step {state.step}, beyond --steps {steps}; type "
            "--steps with the number to go on to"
        )
    checkpoints.about = run_report.about_run(config, step, job, geometry, choice and choice.plan)
    run_report.announce(config, source, step, job, stats, steps, state.step, data)

    # --------------------------------------------------------------------------------------------------------- the loop
    log = MetricsLog(out, state.step) if link().first else NoLog()

    def save(state) -> None:
        loop = Loop(state.step, data.training.get_state(), config.seed, geometry).to_json()
        with within(f"saving step {state.step}", seconds_for(size)):
            checkpoints.save(state.step, run_state.saved_params(step, state), state.optimizer, loop)

    saves = (
        None
        if config.debug_attention_layers is not None
        else Saves(save, lambda state: run_state.go_back(step, data, checkpoints, state))
    )
    planned = choice and choice.plan.step_seconds or None
    # Until all is written: a first signal cuts nothing off.
    with StopSignal(planned) as stop, naming_the_profile(config, job):
        try:
            run_long.begin(config, source, step, state, data, log)
            state = train(config, step, state, steps, data, log, saves, stop)
        finally:
            checkpoints.close()
            log.close()
        if choice is not None and log.seconds:
            measured = peak_memory()[1], peak_host_memory(), log.seconds
            print(planned_against_measured(choice, *measured), flush=True)
        return end(config, source, step, state, steps, stop)


def end(config: TrainConfig, source, step, state, steps: int, stop) -> int:
    """Export the weights, or say why not. Returns the exit code."""
    from alst_jax import run as setup
    from alst_jax import run_state
    from alst_jax.storage import run_directory

    if config.debug_attention_layers is not None:
        print("DEBUG   nothing was saved or exported (--debug-attention-layers)")
        return 0 if stop.received is None else 128 + stop.received
    if stop.received is not None and state.step < steps:
        begun = run_directory.read_run_file(config.out).get("flags", {}).get("steps")
        steps_flag = "" if config.steps == begun else f" --steps {config.steps}"
        print(
            f"stopped by {stop.received.name} before a step was applied; nothing is saved"
            if not state.step
            else f"stopped by {stop.received.name}; step {state.step} is saved. Go on with: "
            f"python train.py --resume --out {config.out}{steps_flag}"
        )
        return 128 + stop.received
    if config.export:
        with within("the export", seconds_for(run_state.size_of(step))):
            run_state.export_all(config, source, step, state, setup.choose_dtype(config))
    return 0


def while_read(main: Callable[[], int]) -> int:
    """main(), without a traceback where standard output is a pipe whose reader has left, as `head` does."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        if link().several:
            return link().failed(UNREAD, 141)
        if not {"-h", "--help"} & set(sys.argv):
            print(
                "\nerror: stopped, since nothing reads standard output any more; go on with --resume", file=sys.stderr
            )
        return 141  # the shell's code of a process that SIGPIPE ends


if __name__ == "__main__":
    sys.exit(while_read(main))
