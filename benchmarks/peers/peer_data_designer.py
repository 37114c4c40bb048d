"""NVIDIA DataDesigner: a structured column over a seed dataset, resumed where that is possible."""

import json
import sys

import data_designer.config as dd
import pandas as pd
from data_designer.interface import DataDesigner
from pydantic import BaseModel

ROWS, URL, FOLDER, IN_FLIGHT = sys.argv[1:]


class Reply(BaseModel):
    answer: str
    certainty: int


def main():
    rows = pd.read_json(ROWS, lines=True)
    model = dd.ModelConfig(
        alias="toy",
        model="toy",
        provider="here",
        inference_parameters=dd.ChatCompletionInferenceParams(
            max_tokens=256, max_parallel_requests=int(IN_FLIGHT)
        ),
        skip_health_check=True,
    )
    designer = DataDesigner(
        artifact_path=FOLDER,
        model_providers=[dd.ModelProvider(name="here", endpoint=URL, api_key="none")],
    )
    designer.set_run_config(dd.RunConfig(otel_metrics_port=None))
    config = dd.DataDesignerConfigBuilder(model_configs=[model])
    config.with_seed_dataset(dd.DataFrameSeedSource(df=rows))
    config.add_column(
        dd.LLMStructuredColumnConfig(
            name="reply",
            model_alias="toy",
            prompt=(
                'Answer as JSON with the fields "answer" (text) and "certainty" (1 to 5).'
                "\n\nQuestion: {{ question }}"
            ),
            output_format=Reply,
        )
    )
    made = designer.create(
        config, num_records=len(rows), dataset_name="answers", resume=dd.ResumeMode.IF_POSSIBLE
    ).load_dataset()
    print(json.dumps({"rows": len(made), "told_lost": 0}))


if __name__ == "__main__":
    main()
