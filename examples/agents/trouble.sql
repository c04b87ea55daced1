-- Trouble in the database of a participant: every seventh effect cannot be written at first. Sequences are not rolled back.
create sequence effects_written;
create function fail_sometimes() returns trigger language plpgsql as $$
begin
    if nextval('effects_written') % 7 = 0 then
        raise exception 'trouble: this is the seventh';
    end if;
    return new;
end $$;

do $$
declare effects constant regclass := coalesce(to_regclass('validation_results'), to_regclass('notifications'));
begin
    execute format('create trigger fail_sometimes before insert on %s for each row execute function fail_sometimes()', effects);
end $$;
