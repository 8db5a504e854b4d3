"""A plan as text for a terminal: some 40 lines of about 100 characters at most."""

from __future__ import annotations

from harness.config.errors import format_value
from harness.config.schema import NO_EXPECTATION, ExpectConfig
from harness.planning.lr_plot import draw_lr
from harness.planning.plan import Plan
from harness.recipe.schedule import error_rule


def render_plan(plan: Plan) -> str:
    """Return the text that `harness plan` prints."""
    blocks = [_summary, draw_lr, _lr_table, _parameters, render_prediction]
    if "noise" in plan:
        blocks.append(_noise)
    return "\n\n".join("\n".join(block(plan)) for block in blocks)


def _summary(plan: Plan) -> list[str]:
    expect = plan["expect"]
    expected = f"error {ExpectConfig.model_validate(expect)}" if expect else NO_EXPECTATION
    return [
        f"model        {plan['model']}, {plan['epochs']} epochs of {plan['images']:,} images",
        f"expected     {expected}",
        f"             a run's error: {error_rule(plan['final_epochs'])}",
        f"minibatch    k = {_count(plan['workers'], 'worker')}, "
        f"n = {_count(plan['worker_batch'], 'image')} each: "
        f"kn = {plan['minibatch']:,} images",
        f"ranks        {_ranks_line(plan)}",
        *["             unless the run measures another size as faster, which rounds differently"]
        * plan["micro_batch_measured"],
        *_sums_lines(plan),
        f"steps        {plan['steps_per_epoch']:,} per epoch, {plan['total_steps']:,} in total",
        f"images       {plan['images_used_per_epoch']:,} used per epoch, "
        f"{plan['images_unused_per_epoch']:,} left over (different ones each time)",
        f"crop         {plan['crop']} pixels; evaluation: short side to {plan['resize']}, then the "
        f"central {plan['crop']}",
        *[f"             running statistics from {plan['recalibrate_images']:,} training images"]
        * (plan["recalibrate_images"] > 0),
        f"peak lr      {plan['peak_lr_arithmetic']}",
        *_distillation(plan),
    ]


def _distillation(plan: Plan) -> list[str]:
    lines = [
        f"stage {number}      {stage['config']}: {stage['model']}, {stage['total_steps']:,} steps, "
        f"unless {stage['run_folder']} is finished"
        for number, stage in enumerate(plan["stages"], 1)
    ]
    if distill := plan["distill"]:
        hard, soft, T = (distill[key] for key in ("hard_weight", "soft_weight", "temperature"))
        source = f"cached in {distill['cache']}" if distill["cache"] else "live"
        lines += [
            f"teacher      {distill['teacher']}, in {distill['precision']}, {source}",
            f"loss         {hard:g} × CE(labels) + {soft:g} × {T:g}² × CE(soft targets, T = {T:g})",
        ]
    if plan["unlabelled"]:
        lines.append(f"unlabelled   {plan['unlabelled']:,} of the {plan['images']:,} images")
    return lines


def _ranks_line(plan: Plan) -> str:
    shares = ", ".join(f"{ranks} × {_count(n, 'worker')}" for ranks, n in plan["shares"])
    passes = _count(plan["micro_batches"], "micro-batch", "es")
    images = _count(plan["micro_batch"], "image")
    return f"{plan['ranks']} ({shares}), a step in at most {passes} of at most {images}"


def _sums_lines(plan: Plan) -> list[str]:
    unit, count = _count(plan["unit_images"], "image"), plan["sent_bytes"]
    megabytes = plan["parameters"] * count / 1e6
    sent = f"ranks send {count} bytes a number, {megabytes:,.3g} MB a step"
    return {
        "exact": [
            f"sums         exact, in passes of {unit}: the same bits on any number of ranks",
            f"             {sent}",
        ],
        "fast": [f"sums         fast, in floats; {sent}"],
        "auto": [
            f"sums         exact, in passes of {unit}, if the run measures at most 3 % more time",
            f"             else fast, in floats; {sent}; exact ones 8 bytes",
        ],
    }[plan["sums"]]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _lr_table(plan: Plan) -> list[str]:
    rows = {step: (epoch, lr, what) for step, epoch, lr, what in plan["lr_corners"]}
    for key, lr in plan.get("lr_at", {}).items():
        rows.setdefault(int(key), (int(key) / plan["steps_per_epoch"], lr, ""))
    lines = [f"{'step':>10}  {'epoch':>7}  {'lr':>10}"]
    for step, (epoch, lr, what) in sorted(rows.items()):
        lines.append(f"{step:>10,}  {epoch:>7.4g}  {lr:>10.4g}  {what}".rstrip())
    return lines


def _parameters(plan: Plan) -> list[str]:
    mark = {True: "ok", False: "FAILED", None: "loaded"}
    options = "".join(
        f", {name} {format_value(v)}" for name, v in plan["optimizer_options"].items()
    )
    lines = [
        f"optimizer    {plan['optimizer']}{options}",
        f"network      of the family {plan['family']!r}",
        f"parameters   {plan['parameters']:,}",
        f"  decayed    {plan['parameters_decayed']:,} by {plan['weight_decay']:g}: "
        + ", ".join(plan["decayed_modules"]),
        f"  undecayed  {plan['parameters_undecayed']:,}: " + ", ".join(plan["undecayed_modules"]),
        *[f"  frozen     {plan['parameters_frozen']:,}: all but the classifier"]
        * (plan["parameters_frozen"] > 0),
        *[f"  classifier lr × {plan['classifier_lr_factor']:g}"]
        * (plan["classifier_lr_factor"] != 1),
        *_layer_wise(plan),
        "checked on the model and the optimizer, as a run would build them",
        *(f"  {mark[check['ok']]:9}  {check['what']}" for check in plan["checks"]),
        *(f"  unchecked  {what}" for what in plan["unchecked"]),
    ]
    if plan["weights"] is not None:
        lines.append(f"  loaded: those of {plan['weights_loaded'] or plan['weights']}")
    return lines


def _layer_wise(plan: Plan) -> list[str]:
    """Return the line on the parameters with learning rates of their own, if there are any."""
    if not (own := plan["parameters_layer_wise"]):
        return []
    return [
        f"  layer-wise {own:,} by learning rates of their own: "
        + ", ".join(plan["layer_wise_modules"]),
        f"  excluded   {plan['parameters'] - own:,} from them, by plain SGD without decay: biases "
        "and batch norm",
    ]


def render_prediction(plan: Plan) -> list[str]:
    """Return the lines on the predicted times."""
    prediction = plan["prediction"]
    if not prediction:
        return ["predicted    nothing: give the throughput of one GPU, --images-per-second X"]
    step, compute = _time(prediction["step_s"]), _time(prediction["compute_s"])
    needed = prediction["hour_needs_images_per_s_a_gpu"]
    hour = (
        f"{needed:,.0f} images/s per GPU"
        if needed
        else "no speed would do: communication takes longer"
    )
    first, *others = prediction["assumed"]
    return [
        f"predicted    step {step}: compute {compute}, "
        f"exposed communication {_time(prediction['exposed_s'])}; limit: {prediction['limit']}",
        f"  in all     {prediction['images_per_s']:,.0f} images/s, "
        f"{100 * prediction['efficiency']:.1f} % of {plan['ranks']} × one GPU",
        f"  time       epoch {_time(prediction['epoch_s'])}, run {_time(prediction['run_s'])}, "
        "evaluations included",
        f"  one hour   needs {hour}",
        f"  assumed    {first}",
        *(f"             {assumption}" for assumption in others),
    ]


def _noise(plan: Plan) -> list[str]:
    noise, error = plan["noise"], plan["noise"]["standard_error"]
    spread = "" if error is None else f" ± {error:,.0f}"
    measured = _count(noise["steps_measured"], "step")
    return [
        f"noise scale  {noise['images']:,.0f}{spread} images, from {measured} of {noise['run']} up "
        f"to epoch {noise['until_epoch']}",
        f"  at kn      {plan['minibatch']:,}: {noise['steps']:.3g} times the fewest steps, "
        f"{noise['examples']:.3g} times the fewest images",
        "             a prediction: (S/S_min - 1) (E/E_min - 1) = 1 (docs/noise-scale.md)",
    ]


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
