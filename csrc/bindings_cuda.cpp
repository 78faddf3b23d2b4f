// Registration of the CUDA implementations, one line per operator.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(diffmas, CUDA, m) {
  m.impl("kv_append", TORCH_BOX(&diffmas::kv_append));
  m.impl("kv_gather", TORCH_BOX(&diffmas::kv_gather));
  m.impl("kv_concat", TORCH_BOX(&diffmas::kv_concat));
  m.impl("kv_concat_backward", TORCH_BOX(&diffmas::kv_concat_backward));
  m.impl("latent_project", TORCH_BOX(&diffmas::latent_project));
  m.impl("latent_project_backward", TORCH_BOX(&diffmas::latent_project_backward));
  m.impl("cached_attention", TORCH_BOX(&diffmas::cached_attention));
  m.impl("cached_attention_backward_queries", TORCH_BOX(&diffmas::cached_attention_backward_queries));
  m.impl("cached_attention_backward_columns", TORCH_BOX(&diffmas::cached_attention_backward_columns));
  m.impl("cached_attention_backward", TORCH_BOX(&diffmas::cached_attention_backward));
  m.impl("cached_attention_backward_token", TORCH_BOX(&diffmas::cached_attention_backward_token));
  m.impl("merge_states", TORCH_BOX(&diffmas::merge_states));
}
