import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srd_modifier.errors import ConfigError, SRDError
from srd_modifier.evaluation.windows import Convention, Window, batches, window_inputs, window_rule


def scored_positions(windows: list[Window]) -> list[int]:
    return [position for window in windows for position in range(window.stop - window.scored, window.stop)]


def test_sliding_smallest_case():
    assert window_rule(ctx=4, stride=2).windows(7) == [Window(0, 4, 3), Window(2, 6, 2), Window(4, 7, 1)]


def test_text_shorter_than_a_window_is_one_window():
    assert window_rule().windows(100) == [Window(0, 100, 99)]


def test_llamacpp_smallest_case():
    rule = window_rule(Convention.LLAMACPP, ctx=8)
    assert rule.windows(23) == [Window(0, 8, 3), Window(8, 16, 3)]


@st.composite
def overlapping(draw):
    ctx = draw(st.integers(2, 80))
    return ctx, draw(st.integers(1, ctx - 1)), draw(st.integers(3, 400))


@given(overlapping())
def test_sliding_scores_every_token_but_the_first_exactly_once(case):
    ctx, stride, num_tokens = case
    windows = window_rule(ctx=ctx, stride=stride).windows(num_tokens)
    assert scored_positions(windows) == list(range(1, num_tokens))


@given(overlapping())
def test_sliding_gives_every_token_its_context(case):
    ctx, stride, num_tokens = case
    for window in window_rule(ctx=ctx, stride=stride).windows(num_tokens):
        assert 0 <= window.start < window.stop <= num_tokens
        assert window.length <= ctx
        assert window.length - window.scored >= (1 if window.start == 0 else ctx - stride)


@given(st.integers(3, 40), st.integers(3, 400))
def test_sliding_without_overlap_loses_one_token_per_window(ctx, num_tokens):
    windows = window_rule(ctx=ctx, stride=ctx).windows(num_tokens)
    assert scored_positions(windows) == [position for position in range(num_tokens) if position % ctx]


@given(st.integers(3, 40), st.integers(0, 400))
def test_llamacpp_scores_the_second_half_of_whole_windows(ctx, extra):
    num_tokens = 2 * ctx + extra
    expected = []
    for chunk in range(num_tokens // ctx):  # as perplexity.cpp: logits first .. n_ctx - 2 predict the token after
        expected += [chunk * ctx + j + 1 for j in range(ctx // 2, ctx - 1)]
    assert scored_positions(window_rule(Convention.LLAMACPP, ctx=ctx).windows(num_tokens)) == expected


@pytest.mark.parametrize(
    ("convention", "ctx", "stride"), [(Convention.SLIDING, 2048, 512), (Convention.LLAMACPP, 512, 512)]
)
def test_defaults_are_the_published_ones(convention, ctx, stride):
    rule = window_rule(convention)
    assert (rule.ctx, rule.stride) == (ctx, stride)


def test_default_stride_shrinks_with_a_small_ctx():
    assert window_rule(ctx=256).stride == 256


@pytest.mark.parametrize(
    ("convention", "ctx", "stride", "message"),
    [
        (Convention.SLIDING, 1, None, "ctx must be at least 2, got 1"),
        (Convention.SLIDING, 8, 0, "stride must be at least 1, got 0"),
        (Convention.SLIDING, 8, 9, "stride must not exceed ctx 8, or tokens would be skipped, got 9"),
        (Convention.LLAMACPP, 2, None, "ctx must be at least 3 with the llamacpp convention, got 2"),
        (Convention.LLAMACPP, 8, 4, r"no overlap: leave stride out \(or give 8\), got 4"),
    ],
    ids=["ctx-1", "stride-0", "stride-above-ctx", "llamacpp-ctx-2", "llamacpp-stride"],
)
def test_bad_sizes_are_refused(convention, ctx, stride, message):
    with pytest.raises(ConfigError, match=message):
        window_rule(convention, ctx=ctx, stride=stride)


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_sliding_refuses_too_few_tokens(num_tokens):
    with pytest.raises(SRDError, match=f"too few tokens: {num_tokens} tokens leave {max(0, num_tokens - 1)} to score"):
        window_rule().windows(num_tokens)


def test_llamacpp_refuses_less_than_two_windows():
    with pytest.raises(SRDError, match=r"needs 1024 \(two windows of 512\), got 1023"):
        window_rule(Convention.LLAMACPP).windows(1023)


@given(overlapping(), st.integers(1, 9))
def test_batches_keep_order_and_never_mix_shapes(case, batch_size):
    ctx, stride, num_tokens = case
    windows = window_rule(ctx=ctx, stride=stride).windows(num_tokens)
    grouped = list(batches(windows, batch_size))
    assert [window for batch in grouped for window in batch] == windows
    assert all(1 <= len(batch) <= batch_size for batch in grouped)
    assert all(len({(window.length, window.scored) for window in batch}) == 1 for batch in grouped)


def test_inputs_are_the_windows_tokens():
    inputs = window_inputs(torch.arange(10), [Window(0, 4, 3), Window(4, 8, 3)])
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_bos_replaces_the_first_token_and_leaves_the_stream_alone():
    stream = torch.arange(10)
    inputs = window_inputs(stream, [Window(0, 4, 3), Window(4, 8, 3)], first_token=99)
    assert inputs.tolist() == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert stream.tolist() == list(range(10))
