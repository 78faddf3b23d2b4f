"""Models for more than text: their text decoder is loaded, and nothing else of them is left."""

import importlib.util

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import arguments, ragged

from diffmas.agents.topology import TOPOLOGIES
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.models.pretrained import load_base
from diffmas.models.wrapper import unwrapped
from diffmas.system import MultiAgentSystem

TOKENIZER = build_tokenizer()
TEXT = dict(
    vocab_size=len(TOKENIZER) + 1, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None,
    pad_token_id=TOKENIZER.pad_token_id, initializer_range=0.3,
)  # fmt: skip
SEES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_channels=3, image_size=8,
    patch_size=4,
)  # fmt: skip
IMAGE = len(TOKENIZER)
QWEN = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    full_attention_interval=2,
)  # fmt: skip
#: Wrapper, text options, vision options, options; the class of the text decoder.
WRAPPERS = {
    "ministral3": (
        "Mistral3", dict(model_type="ministral3"), {}, dict(image_token_index=IMAGE), "Ministral3ForCausalLM",
    ),
    "mistral3": (
        "Mistral3", dict(model_type="mistral", sliding_window=None), {}, dict(image_token_index=IMAGE),
        "MistralForCausalLM",
    ),
    "llava": ("Llava", dict(model_type="llama"), {}, dict(image_token_index=IMAGE), "LlamaForCausalLM"),
    "gemma3": (
        "Gemma3", dict(layer_types=["full_attention"] * 2), {}, dict(image_token_index=IMAGE, mm_tokens_per_image=4),
        "Gemma3ForCausalLM",
    ),
    "llama4": (
        "Llama4",
        dict(num_local_experts=2, intermediate_size_mlp=64, layer_types=["full_attention"] * 2, num_experts_per_tok=1),
        dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16),
        dict(image_token_index=IMAGE), "Llama4ForCausalLM",
    ),
    "qwen3_5": (
        "Qwen3_5", QWEN,
        dict(depth=1, num_heads=2, out_hidden_size=64, temporal_patch_size=2, num_position_embeddings=4),
        dict(image_token_id=IMAGE, video_token_id=IMAGE, vision_start_token_id=IMAGE, vision_end_token_id=IMAGE),
        "Qwen3_5ForCausalLM",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=WRAPPERS)
def saved(request, tmp_path_factory):
    """The wrapper, the folder it is in, and the name of its decoder's class."""
    name, text, vision, options, kind = WRAPPERS[request.param]
    config = getattr(transformers, f"{name}Config")
    texts = {"model_type": None} | TEXT | text
    if texts["model_type"] is None:
        del texts["model_type"]
    torch.manual_seed(0)
    config = config(text_config=texts, vision_config=SEES | vision, **options)
    wrapper = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    folder = tmp_path_factory.mktemp(request.param)
    wrapper.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return wrapper, str(folder), kind


def test_the_text_decoder_is_loaded_and_nothing_else(saved):
    wrapper, folder, kind = saved
    model, _ = load_base(folder)
    assert type(model).__name__ == kind and not model.training
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wrapper(input_ids=ids).logits)
    seeing = {"vision", "visual", "projector"}
    assert not [n for n, _ in model.named_modules() if any(word in n for word in seeing)]
    text = {p for m in (wrapper.get_decoder(), wrapper.get_output_embeddings()) for p in m.parameters()}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in text)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


def test_other_dtypes_and_random_weights(saved):
    _, folder, kind = saved
    assert load_base(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    random, _ = load_base(folder, random_weights=True, dtype="float64")
    assert type(random).__name__ == kind and random.dtype == torch.float64


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_in_four_bits(saved):
    from bitsandbytes.nn import Linear4bit

    _, folder, kind = saved
    model, _ = load_base(folder, quantization="4bit")
    assert type(model).__name__ == kind and model.is_loaded_in_4bit
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) >= 8
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert adapted(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("saved", ["ministral3", "llava"], indirect=True)
def test_a_system_on_it_trains_and_is_saved(saved, tmp_path):
    _, folder, _ = saved
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    system = MultiAgentSystem(folder, TOPOLOGIES["relay"], peft_config=lora, latent_steps=1, prompts="reasoning")
    prompts, answers = ragged([a.name for a in TOPOLOGIES["relay"].agents], 2)
    system(*arguments(prompts, answers)).loss.backward()
    trained = [p for p in system.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all(p.grad is not None for p in trained)
    system.save_pretrained(tmp_path)
    again = MultiAgentSystem.from_pretrained(tmp_path)
    assert again.agent_model.language_model.config._name_or_path == folder
    found, expected = (s.eval()(*arguments(prompts, answers)).loss for s in (again, system))
    torch.testing.assert_close(found, expected)


def test_a_wrapper_with_logits_of_its_own_is_refused(monkeypatch):
    name, text, vision, options, _ = WRAPPERS["llava"]
    config = transformers.LlavaConfig(text_config=TEXT | text, vision_config=SEES, **options)
    wrapper = transformers.LlavaForConditionalGeneration(config)
    own = transformers.LlavaForConditionalGeneration.forward

    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", forward)
    with pytest.raises(ValueError, match="other logits than the LlamaForCausalLM in it"):
        unwrapped(wrapper)


def test_a_wrapper_of_no_causal_language_model_is_refused(tmp_path):
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}}
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'qwen2_vl', which wraps 'qwen2_vl_text'"):
        load_base(str(tmp_path), random_weights=True)


def test_a_wrapper_itself_is_refused_in_a_system():
    name, text, vision, options, _ = WRAPPERS["llava"]
    config = transformers.LlavaConfig(text_config=TEXT | text, vision_config=SEES, **options)
    wrapper = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration wraps a text decoder; allowed: .*unwrapped"):
        MultiAgentSystem(wrapper, TOPOLOGIES["relay"])
