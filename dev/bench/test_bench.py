#!/usr/bin/env python3
"""Does build/bench count and add up? A tiny model, a second; how fast it is makes no difference.

    make build/bench && python3 dev/bench/test_bench.py
"""

import json
import os
import subprocess
import sys
import tempfile
import types
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BENCH = os.path.join(ROOT, "build", "bench")
LLMC_SCRIPT = os.path.join(ROOT, "dev", "bench", "llmc.py")
L, H, C, V, T, B = 2, 2, 32, 80, 32, 2  # --preset tiny
PARAMETERS = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
MULTIPLY = {"qkv_w", "attention", "att_w", "fc_w", "mlp_w", "logits"}
STREAM = {"embedding", "ln1", "ln2", "gelu", "lnf", "loss"}


def bench(*options):
    return subprocess.run([BENCH, *options], capture_output=True, text=True)


def figures(*options):
    """The JSON file of a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench.json")
        done = bench("--json", path, *options)
        assert done.returncode == 0, done.stderr
        with open(path) as file:
            return json.load(file)


def total(rows, rate):
    """What was done, from the rate at which and the time in which: 1e9 a second times milliseconds."""
    return sum(row[rate] * row["ms"] * 1e6 for row in rows)


class Bench(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.all = figures("--preset", "tiny", "--step", "--scaling", "--matmul", "--generate", "--context", str(T),
                          "--repeats", "2")

    def test_model_and_machine(self):
        self.assertEqual(self.all["model"], dict(layers=L, heads=H, channels=C, vocab=V, context=T, batch=B))
        self.assertEqual(self.all["step"]["parameters"], PARAMETERS)
        self.assertTrue(all(value > 0 for value in self.all["machine"].values()))

    def test_rows_are_complete_and_add_up(self):
        step = self.all["step"]
        names = [(row["layer"], row["pass"]) for row in step["rows"]]
        self.assertEqual(len(names), len(set(names)))
        self.assertEqual(set(names), {(layer, way) for layer in MULTIPLY | STREAM for way in ("forward", "backward")}
                         | {("norm", "update"), ("adamw", "update")})
        self.assertTrue(all(row["ms"] > 0 for row in step["rows"]))
        # Medians do not add up exactly, and less so on a busy machine; a layer left out would leave more than this.
        for attempt in range(5):
            missing = 1 - sum(row["ms"] for row in step["rows"]) / step["ms"]
            if abs(missing) < 0.05:
                break
            step = figures("--preset", "small", "--repeats", str(3 + attempt))["step"]
        self.assertLess(abs(missing), 0.05)
        self.assertAlmostEqual(sum(row["of_step"] for row in step["rows"]), 1 - missing)

    def test_operations(self):
        rows = [row for row in self.all["step"]["rows"] if "gflops" in row]
        self.assertEqual({row["layer"] for row in rows}, MULTIPLY)
        for way, each in (("forward", 2), ("backward", 4)):
            some = [row for row in rows if row["pass"] == way]
            weights = 12 * C * C * L + V * C
            self.assertAlmostEqual(total(some, "gflops") / (each * (weights + C * L * T) * B * T), 1, 6)
        fc = [row for row in rows if row["layer"] == "fc_w" and row["pass"] == "forward"]
        self.assertAlmostEqual(total(fc, "gflops") / (L * 2 * B * T * C * 4 * C), 1, 6)

    def test_bytes(self):
        def moved(layer, way):
            return total([row for row in self.all["step"]["rows"] if (row["layer"], row["pass"]) == (layer, way)],
                         "gb_per_s")
        for layer, way, expected in (("norm", "update", 4 * PARAMETERS), ("adamw", "update", 32 * PARAMETERS),
                                     ("ln1", "forward", L * 8 * B * T * C), ("lnf", "backward", 16 * B * T * C),
                                     ("gelu", "backward", L * 48 * B * T * C), ("loss", "forward", 4 * B * T * V)):
            self.assertAlmostEqual(moved(layer, way) / expected, 1, 6, msg=f"{layer} {way}")

    def test_totals(self):
        alone = figures("--preset", "tiny", "--repeats", "1")  # the machine's figures are then from the step's rounds
        step, machine = alone["step"], alone["machine"]
        outside = sum(row["ms"] for row in step["rows"] if "gflops" not in row)
        self.assertAlmostEqual(step["outside_multiplies"], outside / step["ms"])
        self.assertAlmostEqual(step["tokens_per_s"], 1000 * B * T / step["ms"], delta=1)
        self.assertAlmostEqual(step["over_floor"] / (step["ms"] / step["floor_ms"]), 1, places=4)
        work = 6 * (12 * C * C * L + V * C + C * L * T) * B * T / machine["peak_gflops"] / 1e6
        memory = 36 * PARAMETERS / max(machine["read_gb_per_s"], machine["copy_gb_per_s"]) / 1e6
        self.assertAlmostEqual(step["floor_ms"] / (work + memory), 1, 6)
        self.assertTrue(16e-6 * PARAMETERS < step["resident_mb"] < 200)

    def test_scaling(self):
        rows = self.all["scaling"]
        counts = sorted({row["threads"] for row in rows})
        self.assertEqual(counts[0], 1)
        self.assertEqual(counts[-1], self.all["machine"]["threads"])
        self.assertEqual(len(rows), len(counts) * 27)
        self.assertTrue(all(row["speed_up"] == 1 for row in rows if row["threads"] == 1))

    def test_matmul(self):
        rows = self.all["matmul"]
        self.assertEqual([(row["in"], row["out"]) for row in rows[::3]],
                         [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, V)])
        self.assertEqual({row["multiply"] for row in rows}, {"y = x W", "dx = dy Wt", "dW += xt dy"})
        for row in rows:
            self.assertEqual(row["rows"], B * T)
            self.assertTrue(0 < row["of_peak"] <= row["best_of_peak"])
        self.assertTrue(any(row["of_peak"] < row["best_of_peak"] for row in rows))

    def test_generate(self):
        got = self.all["generate"]
        self.assertEqual(got["bytes"], 4 * (PARAMETERS - (T - 1) * C + 2 * L * T * C))
        self.assertEqual((got["cached"], got["prompt"]), (T - 1, 32))
        self.assertTrue(got["ms_per_token"] > 0 and got["prompt_ms"] > 0 and got["one_by_one_ms"] > 0)

    def test_report(self):
        """The table of report.py --bench: a row a layer and pass, with its time and its share of the step."""
        with tempfile.TemporaryDirectory() as folder:
            log, json_file, page = (os.path.join(folder, name) for name in ("run.csv", "bench.json", "page.html"))
            with open(log, "w") as file:
                file.write("step,loss,val_loss,lr,grad_norm,ms,tokens_per_s\n1,4.5,,1e-3,1,10,100\n2,4.25,4,1e-3,1,10,100\n")
            with open(json_file, "w") as file:
                json.dump(self.all, file)
            report = os.path.join(ROOT, "dev", "bench", "report.py")
            done = subprocess.run([sys.executable, report, log, "--bench", json_file, "--out", page], capture_output=True)
            self.assertEqual(done.returncode, 0, msg=done.stderr)
            with open(page, encoding="utf-8") as file:
                text = file.read()
        for row in self.all["step"]["rows"]:
            cells = f"<td>{row['layer']}</td><td>{row['pass']}</td><td>{row['ms']:.3f}</td>"
            self.assertEqual(text.count(cells), 1, msg=cells)
            self.assertIn(f"<td>{100 * row['of_step']:.1f} %</td>", text)
        self.assertEqual(text.count('<rect class="bar"'), len(self.all["step"]["rows"]))

    def test_errors(self):
        for status, options in ((2, ["--fast"]), (2, ["--preset", "gpt5"]), (2, ["--batch"]), (2, ["--layers", "0"]),
                                (2, ["--channels", "33"]), (1, ["--preset", "tiny", "--json", "/nowhere/b.json"]),
                                (1, ["--preset", "gpt2-xl", "--context", "65536", "--batch", "65536"])):
            done = bench(*options)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (status, 1), msg=str(options))
        self.assertEqual(bench("--help").returncode, 0)


class LLMC(unittest.TestCase):
    def test_a_compiler_that_fails_is_left_out(self):
        """llmc.py goes on with those that work: here to what it says of a Makefile that has no train_gpt2."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in ("clang", "#!/bin/sh\nexit 1\n"), ("train_gpt2.c", ""), ("Makefile", "all:\n"):
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text)
            os.chmod(os.path.join(folder, "clang"), 0o755)
            for compilers, last in (["gcc", "clang"], "make"), (["clang"], "a C compiler"):
                done = subprocess.run([sys.executable, LLMC_SCRIPT, "--llmc", folder, "--cc", *compilers],
                                      env={**os.environ, "PATH": folder + ":" + os.environ["PATH"]},
                                      capture_output=True, text=True)
                self.assertIn("clang is left out", done.stdout)
                self.assertEqual("gcc is left out: llm.c's make" in done.stdout, "gcc" in compilers)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, "^llmc.py: .*" + last)


class OnGPU(unittest.TestCase):
    """What pytorch.py --device cuda reads of the programs that it runs: here they are scripts that print it."""

    def setUp(self):
        try:
            import pytorch
        except SystemExit:
            self.skipTest("no PyTorch")
        self.pytorch = pytorch
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.options = types.SimpleNamespace(preset="gpt2", layers=3, heads=2, channels=16, context=8, batch=4, vocab=99,
                                             twin=os.path.join(self.folder.name, "twin"), llmc=self.folder.name)

    def program(self, name, script):
        path = os.path.join(self.folder.name, name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n" + script)
        os.chmod(path, 0o755)

    def test_twin(self):
        self.program("twin", """[ "$*" = "--compare --device cuda --preset gpt2 --layers 3 --heads 2 --channels 16 \
--context 8 --batch 4" ] || exit 1
            echo "model      vocabulary 50257: 12345 parameters; 32 tokens a step"
            echo "| machine | model | batch | ms a step | tokens/s | TFLOP/s | of its own multiply's |"
            echo "|---|---|---|---|---|---|---|"
            echo "| GPU | gpt2 | 4 x 8 | 2.50 | 12800 | 1.5 | 40.0% |" """)
        self.assertEqual(self.pytorch.twins(self.options),
                         {"ms": 2.5, "machine": "GPU", "share": "40.0%", "parameters": 12345})
        self.program("twin", "echo no memory >&2; exit 1")
        with self.assertRaisesRegex(SystemExit, "no memory"):
            self.pytorch.twins(self.options)

    def test_llmc(self):
        self.program("train_gpt2cu", """case "$*" in "-e d3 -i "*" -b 4 -t 8 -d 32 -x 12 "*) ;; *) exit 1;; esac
            [ $(wc -c <"$4") = $((1024 + 2 * (14 * 32 + 1))) ] || exit 1
            for ms in 90 50 3 5 4; do echo "step 1/12 | loss 11.0 | norm 1.0 | lr 1e-4 | $ms.25 ms | 40.0% bf16 MFU"; done""")
        self.assertEqual(self.pytorch.llmc(self.options), 4.25)
        self.program("train_gpt2cu", "echo out of memory")
        with self.assertRaisesRegex(RuntimeError, "out of memory"):
            self.pytorch.llmc(self.options)


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


if __name__ == "__main__":
    result = unittest.main(testRunner=unittest.TextTestRunner(resultclass=Result), exit=False).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed")
    sys.exit(failed > 0)
