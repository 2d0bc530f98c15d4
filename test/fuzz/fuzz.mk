# Fuzzing: see test/fuzz/README.md.

# The guest kernel's parser of notifications, as each series of patches makes it, in user space.
KERNEL_SERIES = 6.1 6.12 7.2
PARSER_FILES = $(wildcard test/fuzz/kernel/*)
PARSERS = $(KERNEL_SERIES:%=build/fuzz/parser-%)
GUIDED_PARSERS = $(KERNEL_SERIES:%=build/fuzz/guided-parser-%)
PARSER_CORPUS = $(wildcard test/fuzz/corpus/kernel/*.hex)

$(PARSERS): build/fuzz/parser-%: $(PARSER_FILES) $(wildcard qemu/guest/kernel/patches/*/*.patch)
	$(call need,gcc,gcc libc6-dev,to compile the kernel's parser)
	$(call need,git,git,to apply the kernel's patches)
	@mkdir -p $(@D) && test/fuzz/kernel/build.sh $* $@ gcc -DALONE

$(GUIDED_PARSERS): build/fuzz/guided-parser-%: $(PARSER_FILES) $(wildcard qemu/guest/kernel/patches/*/*.patch)
	$(call need,clang,clang libclang-rt-dev,for libFuzzer)
	$(call need,git,git,to apply the kernel's patches)
	@mkdir -p $(@D) && test/fuzz/kernel/build.sh $* $@ clang -fsanitize=fuzzer

.PHONY: test-fuzz
test-fuzz: all $(ASAN_ADDON) $(PARSERS)
	$(ASAN_ENV) $(NODE_TEST) $(call tests_in,fuzz)
	@for parser in $(PARSERS); do $$parser 1 $$RANDOM $(PARSER_CORPUS) || exit; done

# make fuzz [TIME=seconds] [SEED=n] [ONLY=target,target] [FROM=case], or ONLY=target CASE=file.
# ONLY=kernel: the guest kernel's parser alone; otherwise it gets a tenth of the time.
FUZZ = nice $(NODE) --no-warnings build/js/test/fuzz/main.js
FUZZ_OPTIONS = $(if $(TIME),--time=$(TIME)) $(if $(SEED),--seed=$(SEED)) $(if $(ONLY),--only=$(ONLY)) $(if $(FROM),--from=$(FROM))
.PHONY: fuzz fuzz-kernel
fuzz: $(if $(filter kernel,$(ONLY)),,fuzz-host) $(if $(filter kernel,$(or $(ONLY),kernel)),fuzz-kernel)

.PHONY: fuzz-host
fuzz-host: all $(ASAN_ADDON)
	@$(ASAN_ENV) $(FUZZ) $(if $(CASE),--replay $(ONLY) $(CASE),$(FUZZ_OPTIONS))

fuzz-kernel: $(GUIDED_PARSERS)
	@mkdir -p build/fuzz/kernel
	@for file in $(PARSER_CORPUS); do tr -d '\n' <$$file | tr a-f A-F | basenc --base16 -d >build/fuzz/kernel/$$(basename $$file .hex); done
	@for parser in $(GUIDED_PARSERS); do \
	  nice $$parser -max_total_time=$$((($(or $(TIME),60) $(if $(ONLY),,/ 10) + 3) / 3)) -max_len=4096 $(if $(SEED),-seed=$(SEED)) \
	    -use_value_profile=1 -verbosity=0 -print_final_stats=1 -artifact_prefix=build/fuzz/ build/fuzz/kernel 2>&1 | \
	    { grep -E 'number_of_executed_units|ERROR|must be|Test unit' || true; }; \
	  [ "$${PIPESTATUS[0]}" = 0 ] || exit 1; \
	done
