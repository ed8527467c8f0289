"""What a run goes on from: `content` says what is in a checkpoint, `manifest` whether it is whole and whose it is,
`folders` puts it on the disk, `store` keeps, finds and prunes those of a run."""
