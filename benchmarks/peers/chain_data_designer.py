"""NVIDIA DataDesigner: three text columns, each of which shows the one before it."""

import json
import sys

import data_designer.config as dd
import pandas as pd
from data_designer.interface import DataDesigner

ROWS, URL, FOLDER, IN_FLIGHT = sys.argv[1:]
COLUMNS = {
    "question": "Ask a hard question about: {{ topic }}",
    "answer": "Answer: {{ question }}",
    "verdict": "Judge this answer: {{ answer }}",
}


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
    for name, prompt in COLUMNS.items():
        config.add_column(dd.LLMTextColumnConfig(name=name, model_alias="toy", prompt=prompt))
    made = designer.create(config, num_records=len(rows), dataset_name="chain").load_dataset()
    print(json.dumps({"rows": len(made)}))


if __name__ == "__main__":
    main()
