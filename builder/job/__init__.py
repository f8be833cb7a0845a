"""The batch job: plan -> units -> workers. Its state lives in the dataset, so any run may be killed and continued."""
