"""transformers' Trainer on our models: steps cut into micro-batches, evaluation, the best model, resuming."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from ldae import LDAEForImageClassification, LDAEForPreTraining

TARGETS = {
    "single_label_classification": lambda i: i % 3,
    "multi_label_classification": lambda i: [float(i % 2), float(i % 3 == 0), 1.0],
    "regression": lambda i: [i / 8, -i / 8, 1.0],
}


def examples(images, config, target=None, count=8):
    pixel_values = images(config, count)
    rows = [{"pixel_values": x} for x in pixel_values]
    return rows if target is None else [{**row, "label": target(i)} for i, row in enumerate(rows)]


def trainer(model, folder, rows, **arguments):
    defaults = {
        "output_dir": str(folder), "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True,
        "report_to": [], "logging_steps": 1, "disable_tqdm": True, "max_grad_norm": 1e9, "save_strategy": "no",
    }  # fmt: skip
    return Trainer(model, TrainingArguments(**{**defaults, **arguments}), train_dataset=rows, eval_dataset=rows)


def same_noise(model):
    """Every image gets the same noise at the same t, however a batch is cut."""
    drawn = {
        name: value[:1] for name, value in model.sample_noise(1, generator=torch.Generator().manual_seed(2)).items()
    }
    model.sample_noise = lambda count, *_: {
        name: value.expand(count, *value.shape[1:]) for name, value in drawn.items()
    }
    return model


@pytest.mark.parametrize("task", [*TARGETS, "pre-training", "pre-training with classes"])
def test_a_step_does_not_depend_on_how_its_batch_is_cut(tiny_model, images, tmp_path, task):
    outcomes = []
    for size in (8, 3):  # the third micro-batch of three has two images
        if task in TARGETS:
            model = tiny_model(LDAEForImageClassification, num_labels=3, problem_type=task)
            rows = examples(images, model.config, TARGETS[task])
        else:
            model = same_noise(tiny_model(num_classes=3 if "classes" in task else 0))
            rows = examples(images, model.config, TARGETS["single_label_classification"] if "classes" in task else None)
        if task == "pre-training":  # without labels Trainer takes micro-batches for equally large
            size = {8: 8, 3: 2}[size]
        run = trainer(
            model,
            tmp_path,
            rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=-(-8 // size),
        )
        run.train()
        outcomes.append(
            (run.state.log_history[0]["loss"], torch.cat([p.detach().flatten() for p in model.parameters()]))
        )
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], rel=2e-4)
    assert_close(outcomes[1][1], outcomes[0][1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [LDAEForPreTraining, LDAEForImageClassification])
def test_evaluation_best_model_and_resuming(tiny_model, images, tmp_path, cls):
    fields = {"num_labels": 3} if cls is LDAEForImageClassification else {}
    target = TARGETS["single_label_classification"] if fields else None
    arguments = {
        "max_steps": 4, "per_device_train_batch_size": 4, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2,
        "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.01, "optim": "adamw_torch",
    }  # fmt: skip

    def make(folder):
        model = tiny_model(cls, **fields)
        model = same_noise(model) if target is None else model
        return trainer(model, tmp_path / folder, examples(images, model.config, target), **arguments)

    whole = make("whole")
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert whole.state.best_metric == min(losses)
    assert whole.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert (tmp_path / "whole" / "checkpoint-4" / "modeling_ldae.py").is_file()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = cls.from_pretrained(tmp_path / "whole" / "checkpoint-4").state_dict()
    found = cls.from_pretrained(tmp_path / "resumed" / "checkpoint-4").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_classes_are_not_left_out_in_silence(tiny_model, images, tmp_path):
    model = same_noise(tiny_model(num_classes=3))
    rows = [{"pixel_values": x, "labels": 1} for x in images(model.config, 8)]
    with pytest.raises(ValueError, match=r"labels must be given .* num_classes=3.* column that is called 'label'"):
        trainer(model, tmp_path, rows, max_steps=1).train()
