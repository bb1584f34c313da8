"""Mistakes in the optimizers' arithmetic and in the loops around it, which the table-driven tests have to find.

The C++ ones are compiled into one module, side by side; a number in it says which of them holds.
"""

from __future__ import annotations

import ctypes
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cuda_on_cpu.build import ROOT, SUFFIX, compile_all, compiler, edited, load, locked, run

from fused import backends
from fused.backends import cpu, cpu_adafactor, factored_table, reference, reference_adafactor, table


@dataclass(frozen=True)
class InCpp:
    """A mistake in C++.

    Attributes:
        file: name of the source file.
        after: where to look for the place from.
        place: text of the file, ``@`` around the expression that is replaced.
        wrong: the expression put there.
    """

    file: str
    after: str
    place: str
    wrong: str


@dataclass(frozen=True)
class InPython:
    """A mistake in a function of the reference backend: ``right``, which stands in it once, becomes ``wrong``."""

    function: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Defect:
    """One mistake in the compiled kernels and in the reference, or in one of them.

    Attributes:
        case: the optimizer whose tests have to find it.
        name: what is wrong.
        cpp: in the kernels; None: not there.
        python: in the reference; None: not there.
    """

    case: str
    name: str
    cpp: InCpp | None
    python: InPython | None


class Rule:
    """Rows for one optimizer."""

    def __init__(self, case: str, file: str, after: str, function: str) -> None:
        self.case, self.file, self.after, self.function = case, file, after, function

    def both(self, name: str, cpp: tuple[str, str], python: tuple[str, str], function: str = "") -> Defect:
        """The same mistake in both languages: (place, wrong expression) and (right, wrong)."""
        return Defect(self.case, name, InCpp(self.file, self.after, *cpp), InPython(function or self.function, *python))


def loop(case: str, name: str, file: str, after: str, place: str, wrong: str) -> Defect:
    """A mistake around a rule."""
    return Defect(case, name, InCpp(file, after, place, wrong), None)


def adam(rule: Rule) -> Iterator[Defect]:
    """What is wrong alike in Adam and AdamW."""
    size, lr = "@T(-(h[kLr] / correction1))@", 'p - h["lr"] / _correction'
    yield rule.both("no step", (size, "T(0)"), (lr, "p - 0.0 / _correction"))
    yield rule.both("sign", (size, "T(h[kLr] / correction1)"), (lr, 'p + h["lr"] / _correction'))
    yield rule.both(
        "no correction of the first moment",
        ("@1.0 - pow(h[kBeta1], step)@", "1.0"),
        (" / _correction(beta1, step)", ""),
    )
    yield rule.both(
        "correction of another step",
        ("@1.0 - pow(h[kBeta2], step)@", "1.0 - pow(h[kBeta2], step + 1.0)"),
        ("_correction(beta2, step)", "_correction(beta2, step + 1)"),
    )
    root = "@quotient(sqrt_(second), c.correction2_sqrt, c.correction2_inverse) + c.eps@"
    plain_root = 'second.sqrt() / _correction(beta2, step) ** 0.5 + h["eps"]'
    yield rule.both(
        "eps in the root",
        (root, "sqrt_(second / (c.correction2_sqrt * c.correction2_sqrt) + c.eps)"),
        (plain_root, '(second / _correction(beta2, step) + h["eps"]).sqrt()'),
    )
    yield rule.both(
        "eps before the correction",
        (root, "(sqrt_(second) + c.eps) / c.correction2_sqrt"),
        (plain_root, '(second.sqrt() + h["eps"]) / _correction(beta2, step) ** 0.5'),
    )
    yield rule.both(
        "the largest moment is forgotten",
        ("@max_nan(s[2], s[1])@", "s[1]"),
        ("torch.maximum(s[2], exp_avg_sq)", "exp_avg_sq"),
    )
    yield rule.both(
        "weight of the squares", ("@c.weight2@ * g", "c.weight1"), ("(1 - beta2) * g * g", "(1 - beta1) * g * g")
    )


ADAM, ADAMW = (Rule(case, "rules.h", "struct Adam {", "adam") for case in ("Adam", "AdamW"))
LION = Rule("Lion", "rules.h", "struct Lion {", "lion")
SGD = Rule("SGD", "rules.h", "struct SGD {", "sgd")
RMSPROP = Rule("RMSprop", "rules.h", "struct RMSprop {", "rmsprop")
ADAGRAD = Rule("Adagrad", "rules.h", "struct Adagrad {", "adagrad")
ADADELTA = Rule("Adadelta", "rules.h", "struct Adadelta {", "adadelta")
ADAFACTOR = Rule("Adafactor", "adafactor.h", "struct Adafactor {", "adafactor")

NEG_LR = "@T(-h[kLr])@"
DECAY = 'h["lr"] * h["weight_decay"]'


def decoupled_penalty(rule: Rule) -> Defect:
    """Decay of the parameter where a penalty belongs into the gradient."""
    return rule.both(
        "decoupled decay",
        ("@add_l2(g, p, c.l2)@", "(p += c.neg_lr * c.l2 * p, g)"),
        ('_add_l2(g, p, h["weight_decay"])', f"(p.mul_(1 - {DECAY}), g)[1]"),
    )


DECOUPLED, DECOUPLED_PYTHON = "@h[kDecoupled] != 0.0@", 'h["decoupled_weight_decay"]'
LION_BLEND, LION_STEP = "@c.beta1 * s[0] + c.weight1 * g@", 'p - h["lr"] * direction'
ADAGRAD_LR = "@T(-(h[kLr] / (1.0 + (step - 1.0) * h[kLrDecay])))@"
OUT = "@has_moment(h) ? (early ? -size : -1.0) : -size * clipped@"

DEFECTS = (
    *adam(ADAM),
    ADAM.both("decoupled decay", (DECOUPLED, "true"), (DECOUPLED_PYTHON, "True")),
    *adam(ADAMW),
    ADAMW.both("coupled decay", (DECOUPLED, "false"), (DECOUPLED_PYTHON, "False")),
    ADAMW.both(
        "decay without the learning rate",
        ("1.0 - @h[kLr] * h[kWeightDecay]@", "h[kWeightDecay]"),
        (f"1 - {DECAY}", '1 - h["weight_decay"]'),
    ),
    LION.both("no step", (NEG_LR, "T(0)"), (LION_STEP, "p")),
    LION.both("sign", (NEG_LR, "T(h[kLr])"), (LION_STEP, 'p + h["lr"] * direction')),
    LION.both(
        "coupled decay",
        (LION_BLEND, "c.beta1 * s[0] + c.weight1 * (g + (T(1) - c.decay) * p)"),
        ("(1 - beta1) * g", '(1 - beta1) * (g + h["weight_decay"] * p)'),
    ),
    LION.both("no decay", ("p *= @c.decay@", "T(1)"), (f"p * (1 - {DECAY})", "p * 1")),
    LION.both(
        "decay after the step",
        ("@c.neg_lr * direction@", "c.neg_lr * direction * c.decay"),
        (LION_STEP, f"{LION_STEP} * (1 - {DECAY})"),
    ),
    LION.both(
        "averages mixed up",
        (LION_BLEND, "c.beta2 * s[0] + c.weight2 * g"),
        ("beta1, beta2 =", "beta2, beta1 ="),
    ),
    SGD.both("no step", (NEG_LR, "T(0)"), ('_axpy(-h["lr"], g, p), [buffer]', "p, [buffer]")),
    SGD.both("sign", (NEG_LR, "T(h[kLr])"), ('_axpy(-h["lr"], g, p), []', '_axpy(h["lr"], g, p), []')),
    decoupled_penalty(SGD),
    SGD.both("first gradient dampened", ("@step <= 1.0@", "false"), ("1.0 if step <= 1 ", "1.0 if step <= 0 ")),
    SGD.both(
        "momentum twice",
        ("@c.momentum * s[0]@", "c.momentum * c.momentum * s[0]"),
        ('h["momentum"] * s[0]', 'h["momentum"] ** 2 * s[0]'),
    ),
    SGD.both("no nesterov", ("@fma_(c.momentum, s[0], g)@", "s[0]"), ('if h["nesterov"]', "if False")),
    RMSPROP.both("no step", (NEG_LR, "T(0)"), ('p - h["lr"] * g / average', "p")),
    RMSPROP.both("sign", (NEG_LR, "T(h[kLr])"), ('p - h["lr"] * g', 'p + h["lr"] * g')),
    RMSPROP.both(
        "eps in the root",
        ("@sqrt_(average) + c.eps@", "sqrt_(average + c.eps)"),
        ('average.sqrt() + h["eps"]', '(average + h["eps"]).sqrt()'),
    ),
    decoupled_penalty(RMSPROP),
    RMSPROP.both(
        "not centered",
        ("@fma_(-s[1], s[1], average)@", "average"),
        ("square_avg - grad_avg * grad_avg", "square_avg"),
    ),
    RMSPROP.both(
        "a buffer that forgets nothing", ("@c.momentum * buffer@", "buffer"), ('h["momentum"] * s[-1]', "s[-1]")
    ),
    ADAGRAD.both("no step", (ADAGRAD_LR, "T(0)"), ("p - lr * g", "p - 0 * g")),
    ADAGRAD.both("sign", (ADAGRAD_LR, "T(h[kLr])"), ("p - lr * g", "p + lr * g")),
    ADAGRAD.both(
        "eps in the root",
        ("@(sqrt_(s[0]) + c.eps)@", "sqrt_(s[0] + c.eps)"),
        ('(total.sqrt() + h["eps"])', '(total + h["eps"]).sqrt()'),
    ),
    ADAGRAD.both(
        "lr_decay of another step",
        (ADAGRAD_LR, "T(-(h[kLr] / (1.0 + step * h[kLrDecay])))"),
        ("(step - 1)", "step"),
    ),
    decoupled_penalty(ADAGRAD),
    ADADELTA.both("no step", (NEG_LR, "T(0)"), ('_axpy(-h["lr"], delta, p)', "p")),
    ADADELTA.both("sign", (NEG_LR, "T(h[kLr])"), ('_axpy(-h["lr"]', '_axpy(h["lr"]')),
    ADADELTA.both(
        "eps out of the root",
        ("@sqrt_(s[0] + c.eps)@", "(sqrt_(s[0]) + c.eps)"),
        ('(square_avg + h["eps"]).sqrt()', '(square_avg.sqrt() + h["eps"])'),
    ),
    ADADELTA.both(
        "an average that forgets nothing", ("@c.rho * s[1]@", "s[1]"), ('s[1] * h["rho"]', "s[1]")
    ),
    decoupled_penalty(ADADELTA),
    ADAFACTOR.both("no step", (OUT, "0.0"), ("update = g * root", "update = 0 * g")),
    ADAFACTOR.both("sign", (OUT, "size"), ("update = g * root", "update = -g * root")),
    ADAFACTOR.both(
        "decay after the step",
        ("@fma_(neg_out, update, p * decay)@", "fma_(neg_out, update, p) * decay"),
        ("decayed - _like(size, p) * update", f"decayed - _like(size, p) * update * (1 - {DECAY})"),
    ),
    ADAFACTOR.both(
        "unit of the decay", ("@(flags & kDecayByStep) != 0 ? size : h[kLr]@", "size"), ('else h["lr"]', "else size")
    ),
    ADAFACTOR.both(
        "a moment that forgets nothing",
        ("@beta1 * moment@", "moment"),
        ("beta1 * moment + (1.0 - beta1) * _like", "moment + (1.0 - beta1) * _like"),
    ),
    ADAFACTOR.both("not clipped", ("@ratio > 1.0 ? 1.0 / ratio : 1.0@", "1.0"), ('if h["d"] is not None', "if False")),
    ADAFACTOR.both(
        "decay of another step", ("@pow(t, h[kBeta2Decay])@", "pow(t + 1.0, h[kBeta2Decay])"),
        ("(step **", "((step + 1) **"), "second_moment",
    ),
    ADAFACTOR.both(
        "eps added everywhere",
        ("@(flags & kAddEps) != 0 ? eps1 : 0.0@", "eps1"),
        ("g * g + eps1 if adds else g * g", "g * g + eps1"), "second_moment",
    ),
    ADAFACTOR.both(
        "eps in the root", ("@1.0 / eps1@;", "1.0 / sqrt(eps1)"), ("min(1.0 / eps1,", "min(eps1 ** -0.5,"),
        "second_moment",
    ),
    ADAFACTOR.both(
        "no mean of the rows", ("@sqrt_(mean / row)@", "sqrt_(T(1) / row)"),
        ("(mean / new[0]).sqrt()", "new[0].rsqrt()"), "second_moment",
    ),
    ADAFACTOR.both(
        "step size of another step",
        ("@rho < 1.0 / sqrt(t) ? rho : 1.0 / sqrt(t)@", "rho < 1.0 / sqrt(t + 1.0) ? rho : 1.0 / sqrt(t + 1.0)"),
        ("step.rsqrt()", "(step + 1).rsqrt()"), "step_size",
    ),
    ADAFACTOR.both(
        "scale of the parameter",
        ("@(rms_param > h[kEps2] ? rms_param : h[kEps2])@", "(rms_param + h[kEps2])"),
        ('.clamp(min=h["eps"][1])', ' + h["eps"][1]'), "step_size",
    ),
    loop("AdamW", "tail", "kernels.cpp", "void apply_rule(", "i < @n@;", "n - 1"),
    loop("Lion", "last block", "kernels.cpp", "void update_float(", "b < @end@;", "end - 1"),
    loop("SGD", "last block", "kernels.cpp", "void update_double(", "b < @end@;", "end - 1"),
    loop("Adam", "not maximized", "kernels.cpp", "void update_float(", "grad_factor * @group.grad_sign@", "1.0"),
    loop("Adam", "another tensor's constants", "kernels.cpp", "constants_for(", "@cache.step == context.step@", "true"),
    loop("AdamW", "tail of a tensor", "driver.cpp", "class Partition", "return @row.numel@;", "row.numel - 1"),
    loop("AdamW", "pieces overlap", "driver.cpp", "class Partition", "@from - position@", "(from - position) / 2"),
    loop("Adam", "steps counted twice", "driver.cpp", "void update(", "+= @1.0f@", "2.0f"),
    loop("AdamW", "tail of a conversion", "storage.h", "void convert(", "i < @n@;", "n - 1"),
    loop("Adafactor", "tail", "adafactor_kernels.h", "void apply_block(", "i < @n@;", "n - 1"),
    loop("Adafactor", "tail of a sum", "adafactor_sums.h", "double sum_of(", "i + l < @n@;", "n - 1"),
    loop("Adafactor", "last column", "adafactor_kernels.h", "void fill_roots(", "k < @count@;", "count - 1"),
    loop("Adafactor", "mean", "adafactor_kernels.h", "void fill_roots(", "T(job.mean[@++m@])", "m++"),
    loop(
        "Adafactor", "last small matrix", "adafactor_small.h", "void small_matrices(",
        "std::min(at_once, @last - m@)", "last - m - 1",
    ),
    loop("Adafactor", "small: mean", "adafactor_small.h", "void factor()", "T(max_nan(@sum[l] * share@", "sum[l]"),
    loop("Adafactor", "small: columns", "adafactor_small.h", "void average(", "average(cols_, 1, rows_, @cols_@", "1"),
    loop("Adafactor", "small: third term", "adafactor_small.h", "void sum_terms(", "n - i == @3@", "5"),
    loop("Adafactor", "small: norm", "adafactor_small.h", "double update_squares()", "(@count_@, [", "count_ / 2"),
    loop("Adafactor", "small: last lane", "adafactor_small.h", "void from_lanes(", "i < @count@;", "count - 1"),
    loop("Adafactor", "small: roots", "adafactor_small.h", "T* small_roots(", "buffer + @(begin - first * size)@", "0"),
    loop(
        "Adafactor", "coupled decay", "adafactor_kernels.h", "void apply_block(",
        "Adafactor::apply(p[i], @g[i] * factor@", "(g[i] * factor + (T(1) - decay) * p[i])",
    ),
)  # fmt: skip

IN_CPP = [defect for defect in DEFECTS if defect.cpp is not None]
IN_PYTHON = [defect for defect in DEFECTS if defect.python is not None]


def plant(file: str, text: str) -> str:
    """A source file with its defects, each behind a comparison with the number of the one that holds."""
    places: dict[tuple[int, int], str] = {}
    for number, defect in enumerate(IN_CPP, start=1):
        assert defect.cpp is not None
        if defect.cpp.file != file or defect.cpp.after not in text:
            continue
        before, right, _ = defect.cpp.place.split("@")
        start = text.find(defect.cpp.place.replace("@", ""), text.index(defect.cpp.after))
        assert start >= 0, f"{file} has no place for '{defect.case}: {defect.name}' any more"
        start += len(before)
        at = start, start + len(right)
        places[at] = places.get(at, "") + f"planted_defect == {number} ? ({defect.cpp.wrong}) : "
    for start, end in sorted(places, reverse=True):
        text = f"{text[:start]}({places[start, end]}({text[start:end]})){text[end:]}"
    if file == "rules.h":
        number_of_it = 'extern "C" { __attribute__((visibility("default"))) inline int planted_defect = 0; }'
        text = text.replace("#pragma once\n", f"#pragma once\n{number_of_it}\n")
    return text


FLAGS = [
    *("-std=c++17", "-O0", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"),
    # The module is loaded beside the ordinary one: their types must not be taken for each other's.
    *("-Dfused=fused_planted", "-DFUSED_ISA_LIST=X(baseline)", "-DFUSED_ISA=baseline"),
]


def build() -> Path:
    """Compiles the extension for the CPU with all defects; objects are kept where their sources have not changed."""
    folder = ROOT / "build" / "planted"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        csrc = edited(folder / "csrc", plant)
        planted = "".join(path.read_text() for path in csrc.rglob("*.*"))
        for number, defect in enumerate(IN_CPP, start=1):
            assert f"planted_defect == {number} ?" in planted, f"no place for '{defect.case}: {defect.name}' any more"

        objects = compile_all([*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")], folder, FLAGS)
        module = folder / f"_C{SUFFIX}"
        run([*compiler(), "-shared", "-fopenmp", *map(str, objects), "-o", str(module)])
    return module


class PlantedKernels:
    """The compiled module, loaded."""

    def __init__(self, path: Path) -> None:
        self.extension = load(path, "planted")
        self.chosen = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "planted_defect")

    def serve(self, defect: Defect | None, patch: pytest.MonkeyPatch) -> None:
        """Has the CPU backend step through these kernels, with one defect or none."""
        for module in (backends, cpu, cpu_adafactor, factored_table, table):
            patch.setattr(module, "extension", self.extension)
        self.chosen.value = 0 if defect is None else IN_CPP.index(defect) + 1


def plant_in_reference(defect: Defect, patch: pytest.MonkeyPatch) -> None:
    """Puts a function with the defect in the place of the right one."""
    assert defect.python is not None
    name = defect.python.function
    module = reference_adafactor if hasattr(reference_adafactor, name) else reference
    right = getattr(module, name)
    source = textwrap.dedent(inspect.getsource(right))
    assert source.count(defect.python.right) == 1, f"{name} has no place for '{defect.name}' any more"
    code = compile(
        source.replace(defect.python.right, defect.python.wrong), f"<{defect.name}>", "exec", dont_inherit=True
    )
    made: dict[str, Any] = {}
    exec(code, vars(module), made)  # noqa: S102
    patch.setattr(module, name, made[name])
    if module is reference:
        for rule, function in reference.FUNCTIONS.items():
            if function is right:
                patch.setitem(reference.FUNCTIONS, rule, made[name])
