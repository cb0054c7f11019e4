"""The hooks of a run: figures to files, progress to the screen, pictures to ``plots/``."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

from horoyolo.compression.build import AUTO
from horoyolo.config import InputError
from horoyolo.engine.build import Training
from horoyolo.engine.hooks import EPOCH_COLUMNS, STEP_COLUMNS, EpochRecord, Hook, StepRecord
from horoyolo.engine.ledger import WriteLedger
from horoyolo.engine.network import WarnSlowNetwork
from horoyolo.engine.recipe import class_counts, recipe_lines
from horoyolo.report.diagnose import diagnose_run
from horoyolo.report.monitor import CsvWriter, Progress, TensorBoardWriter, Writer
from horoyolo.report.plots import plot_batch, plot_curves

log = logging.getLogger("horoyolo")

PLOTTED_BATCHES = 3
CURVES_EVERY_S = 60.0


def build_hooks(job: Training) -> list[Hook]:
    """What watches this worker: all of it on rank 0; who writes the ledger is seen to at each update."""
    everywhere: list[Hook] = [WriteLedger(job)]
    return [*everywhere, *build_recording_hooks(job)] if job.comm.rank() == 0 else everywhere


def build_recording_hooks(job: Training) -> list[Hook]:
    """What rank 0 has besides."""
    # Of `auto` alone the entries differ, and so do their waits.
    slow_network = WarnSlowNetwork(job.compressor.settled if job.config.comms.compression == AUTO else lambda: True)
    plots = [DrawPlots(job)] if job.config.plots else []
    return [TellRecipe(job), RecordFigures(job), ShowProgress(job), slow_network, *plots, Diagnose(job)]


class TellRecipe(Hook):
    """At the start, what is out of the ordinary about data and recipe."""

    def __init__(self, job: Training) -> None:
        self._job = job

    def before_train(self) -> None:
        job = self._job
        counts = class_counts(job.train_split, job.model.num_classes)
        for line in (*job.train_split.report.lines(), *job.val_split.report.lines()):
            log.info("%s", line)
        for line in recipe_lines(job.config, job.model, job.loss, job.schedule, counts):
            log.info("%s", line)


class Diagnose(Hook):
    """At the end, what losses and scores say, in words."""

    def __init__(self, job: Training) -> None:
        self._job = job

    def after_train(self) -> None:
        try:
            log.info("diagnosis: %s", "; ".join(diagnose_run(self._job.run.folder)))
        except InputError as error:  # a full disk may have left no whole results.csv; the training is done all the same
            log.warning("no diagnosis: %s", error)


class RecordFigures(Hook):
    """steps.csv, results.csv and TensorBoard events; a resumed run goes on where its checkpoint stood.

    Who takes this over in an elastic job adds the steps that the rank 0 before it died without writing.
    """

    def __init__(self, job: Training) -> None:
        self._job = job
        folder = job.run.folder
        self._steps = CsvWriter(folder / "steps.csv", STEP_COLUMNS, job.progress.step)
        self._epochs = CsvWriter(folder / "results.csv", EPOCH_COLUMNS, self._last_of_epochs)
        self._events = self._open_events()
        for record in list(job.recent):
            if record.step > self._steps.last_step:
                self.missed_step(record)

    def _open_events(self) -> TensorBoardWriter:
        return TensorBoardWriter(self._job.run.folder / "tensorboard", self._job.progress.step)

    @property
    def _last_of_epochs(self) -> int:
        """The last step that an epoch may have ended with: one whose last update is done may still be evaluated again."""
        return self._job.progress.step - (self._job.progress.epoch_images > 0)

    def after_change(self) -> None:
        progress = self._job.progress
        if self._steps.last_step > progress.step or (progress.epoch_images and self._epochs.last_step == progress.step):
            self.after_return()

    def missed_step(self, record: StepRecord) -> None:
        self.after_step(record, None)

    def after_return(self) -> None:
        self._steps.go_back(self._job.progress.step)
        self._epochs.go_back(self._last_of_epochs)
        self._events.close()
        self._events = self._open_events()

    def after_step(self, record: StepRecord, batch: Any) -> None:
        figures = asdict(record)
        self._steps.write(record.step, figures)
        self._events.write(record.step, {f"step/{name}": figures[name] for name in ("loss", "lr", "data_s", "exchange_wait_s")})

    def after_epoch(self, record: EpochRecord) -> None:
        figures = asdict(record)
        self._epochs.write(record.step, figures)
        self._events.write(record.step, {f"epoch/{name}": value for name, value in figures.items()})

    def after_train(self) -> None:
        writers: tuple[Writer, ...] = (self._steps, self._epochs, self._events)
        for writer in writers:
            writer.close()


class ShowProgress(Hook):
    """A bar an epoch, and a line with the epoch's scores."""

    def __init__(self, job: Training) -> None:
        self._job = job
        self._progress = Progress()
        self._epoch = -1

    def after_step(self, record: StepRecord, batch: Any) -> None:
        if record.epoch != self._epoch:
            self._epoch = record.epoch
            consumed = self._job.sampler.consumed - record.images
            self._progress.start(f"epoch {record.epoch + 1}/{self._job.config.epochs}", self._job.sampler.num_samples, consumed)
        losses = f"box {record.box_loss:.4f} obj {record.obj_loss:.4f} cls {record.cls_loss:.4f}"
        self._progress.advance(record.images, f"{losses}, waited {record.exchange_wait_s * 1e3:.0f} ms")

    def after_epoch(self, record: EpochRecord) -> None:
        self._progress.close()
        scores = "" if record.map50 is None else f", mAP50 {record.map50:.3f}, mAP50-95 {record.map50_95:.3f}"
        loss = record.train_box_loss + record.train_obj_loss + record.train_cls_loss
        log.info("epoch %d/%d: loss %.4f%s, %.1f s", record.epoch + 1, self._job.config.epochs, loss, scores, record.seconds)

    def after_train(self) -> None:
        self._progress.close()


class DrawPlots(Hook):
    """The first batches with their boxes, and the curves so far from time to time."""

    def __init__(self, job: Training) -> None:
        self._job = job
        self._drawn_s = time.monotonic()

    def after_step(self, record: StepRecord, batch: Any) -> None:
        if record.step <= PLOTTED_BATCHES:
            path = self._job.run.plots / f"train_batch{record.step - 1}.png"
            plot_batch(batch.images, batch.targets, self._job.model.names, path)

    def after_epoch(self, record: EpochRecord) -> None:
        if time.monotonic() - self._drawn_s >= CURVES_EVERY_S:
            self._drawn_s = time.monotonic()
            self._draw_curves()

    def after_train(self) -> None:
        self._draw_curves()

    def _draw_curves(self) -> None:
        plot_curves(self._job.run.folder / "results.csv", self._job.run.plots)
