"""peft_names: what is here in the place of names that people look for by those of peft."""

OF_PEFT = {
    "AutoPeftModel": "surgery.load_model(path)",
    "AutoPeftModelForCausalLM": "surgery.load_model(path)",
    "AutoPeftModelForSequenceClassification": "surgery.load_model(path)",
    "PeftConfig": "surgery.LoraConfig, or the config of another method",
    "PeftModel": "surgery.load(model, path)",
    "PeftModelForCausalLM": "surgery.load(model, path)",
    "get_peft_model": "surgery.inject(model, config)",
    "get_peft_model_state_dict": "model.get_adapter_state_dict()",
    "inject_adapter_in_model": "surgery.inject(model, config)",
    "prepare_model_for_kbit_training": "surgery.inject(model, config), which takes quantized models as they are",
    "set_peft_model_state_dict": "model.load_adapter(peft_config=config, adapter_state_dict=tensors)",
}
