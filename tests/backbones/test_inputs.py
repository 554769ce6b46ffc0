"""Inputs of backbones."""

import numpy as np
import pandas as pd
import pytest
import torch

from ibaml.backbones.inputs import concatenate, digests, num_inputs_of, read_backbone_inputs, signature, take

TOKENS = {"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}


class TestForms:
    @pytest.mark.parametrize("texts", [["a", "b"], ("a", "b"), np.array(["a", "b"]), pd.Series(["a", "b"])])
    def test_text(self, texts):
        assert read_backbone_inputs("x", texts) == ["a", "b"]

    @pytest.mark.parametrize("values", [[[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])])
    def test_numbers(self, values):
        found = read_backbone_inputs("x", values)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.tolist() == [[1, 2], [3, 4]]

    def test_unsigned_and_reversed_arrays(self):
        assert read_backbone_inputs("x", np.arange(3, dtype=np.uint16)[::-1]).tolist() == [2, 1, 0]

    def test_mappings_keep_their_members_together(self):
        found = read_backbone_inputs("x", TOKENS)
        assert num_inputs_of(found) == 2
        part = take(found, [1])
        assert part["input_ids"].tolist() == [[4, 5, 0]] and part["attention_mask"].tolist() == [[1, 1, 0]]
        both = concatenate([part, take(found, [0])])
        assert both["input_ids"].tolist() == [[4, 5, 0], [1, 2, 3]]
        assert signature(part) == signature(found)

    def test_text_and_tensors_are_taken_and_joined(self):
        assert concatenate([take(["a", "b", "c"], [2, 0]), ["d"]]) == ["c", "a", "d"]
        values = torch.arange(3)
        assert concatenate([take(values, [2]), take(values, [0])]).tolist() == [2, 0]


class TestDigests:
    def test_equal_inputs_alone_have_equal_digests(self):
        first, second, third = digests(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.5]]))
        assert first == second != third
        different = [torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1, 2]])]
        assert len({first, *(digests(each)[0] for each in different), *digests(["1.0 2.0"])}) == 5

    def test_every_member_of_a_mapping_counts(self):
        changed = {**TOKENS, "attention_mask": [[1, 1, 1], [1, 1, 1]]}
        before, after = digests(read_backbone_inputs("x", TOKENS)), digests(read_backbone_inputs("x", changed))
        assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("a text", TypeError, r"x is a single string; expected a list of them: use \[text\]"),
        (["a", 3.5, None][::-1], TypeError, "x holds a NoneType in row 0; expected arrays of numbers or strings"),
        (np.array([["a", "b"]]), TypeError, "x has dtype <U1; expected numbers, or a list of strings"),
        (3.0, ValueError, "x is a single number"),
        (torch.tensor([[1.0], [float("nan")]]), ValueError, "missing .* or infinite values, the first in row 1"),
        ({"a": [1, 2], "b": [1]}, ValueError, r"x is a mapping of \{'a': 2, 'b': 1\}; expected arrays with as many"),
        ({}, ValueError, "x is a mapping of nothing"),
        (pd.DataFrame({"text": ["a"]}), TypeError, r"x is a table, but .* table\['text'\].tolist\(\)"),
    ],
)
def test_refused(x, error, message):
    with pytest.raises(error, match=message):
        read_backbone_inputs("x", x)
