# swift sft, started inside it by headstart's verb: HEADSTART=pissa bash verb.sh
swift sft \
  --model run/model --model_type llama --template chatml \
  --tuner_type lora --target_modules all-linear --lora_rank 8 --lora_alpha 16 \
  --external_plugins headstart_plugin.py --callbacks headstart \
  --dataset run/data.jsonl --split_dataset_ratio 0 --max_length 512 \
  --output_dir run/out --add_version false \
  --torch_dtype float32 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 \
  --learning_rate 1e-3 --max_steps 8 --logging_steps 1 --save_steps 8 --report_to none "$@"
